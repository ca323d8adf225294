"""The plan of a suite as `--dry-run` prints it: size, estimated time, the first blocks. No torch."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, Literal

from moebench.catalogue.hardware import Hardware
from moebench.earlier_runs import Known, known_from
from moebench.estimate import estimate_seconds
from moebench.manifest import suite_hash
from moebench.options import Options
from moebench.point import problem_name
from moebench.suite import Suite
from moebench.work import BYTES_PER_WEIGHT

SHOWN_BLOCKS = 12
SHEET_GEMM, SHEET_MEMORY = 0.75, 0.85  # of the data sheet's dense peak and bandwidth, where nobody reports better
Row = dict[str, Any]
Kind = Literal["cpu", "cuda"]


def plan_rows(suite: Suite, device: str, runs: Path, elsewhere: Hardware | None = None) -> list[Row]:
    """One flat row: points, blocks, seconds, and what the estimate rests on.

    `auto` is planned for the GPU where a driver is loaded. The estimate is calibrated by the ceilings of the newest
    run on the same kind of device under `runs`, and corrected by what complete runs took there.

    Args:
        elsewhere: plan for this device, which need not be here, by its data sheet; `device` and `runs` are not asked.

    Raises:
        ValueError: a data sheet without a peak or a bandwidth.
    """
    kind: Kind = "cuda" if elsewhere or device == "cuda" or (device == "auto" and _has_gpu()) else "cpu"
    size = suite.count(kind)
    if elsewhere:
        known = Known(data_sheet_ceilings(elsewhere))
    else:
        known = known_from(runs, kind, suite_hash(suite, Options(runs)))
    estimate = estimate_seconds(suite, kind, known.ceilings, known.factors)
    return [
        {
            "suite": suite.name,
            "device_kind": kind,
            "points": size.points,
            "blocks": size.blocks,
            "replicates": suite.replicates,
            "seconds": round(estimate.seconds, 1),
            "basis": f"data sheet of {elsewhere.name}" if elsewhere else estimate.basis,
            "earlier_runs": known.runs,
            "sampled_blocks": estimate.sampled,
        }
    ]


def data_sheet_ceilings(hardware: Hardware) -> dict[str, Any]:
    """What a device that is not here should reach, as a run's ceilings would say it.

    Raises:
        ValueError: the row has no bf16 peak or no bandwidth.
    """
    peak, bandwidth = hardware.bf16_dense_tflops, hardware.mem_bw_gbs
    if not peak or not bandwidth:
        raise ValueError(f"{hardware.name}: the hardware table has no bf16 peak or no bandwidth to plan with")
    share = (hardware.measured_max_bf16_tflops or SHEET_GEMM * peak) / peak
    peaks = {precision: hardware.peak_tflops(precision) for precision in BYTES_PER_WEIGHT}
    rates = {precision: share * value for precision, value in peaks.items() if value}
    return {"gemm_tflops": rates, "copy_gbs": SHEET_MEMORY * bandwidth, "read_gbs": None}


def plan_text(suite: Suite, rows: list[Row]) -> str:
    """The plan in a few lines."""
    row = rows[0]
    sampled = "" if row["sampled_blocks"] >= row["blocks"] else f", from a sample of {row['sampled_blocks']} blocks"
    lines = [
        f"{suite.name}: {suite.question}",
        f"{row['points']:,} points in {row['blocks']:,} blocks on {row['device_kind']}"
        + (f", {row['replicates']} replicates" if row["replicates"] > 1 else ""),
        f"about {duration(row['seconds'])} ({row['basis']}{_corrected(row['earlier_runs'])}{sampled})",
    ]
    for block in islice(suite.blocks(row["device_kind"]), SHOWN_BLOCKS):
        providers = ", ".join(dict.fromkeys(variant.provider for variant in block.variants))
        lines.append(f"  {problem_name(block.problem)}: {providers}")
    rest = row["blocks"] - SHOWN_BLOCKS
    return "\n".join([*lines, f"  ... and {rest:,} more blocks"] if rest > 0 else lines)


def _corrected(runs: int) -> str:
    return f", corrected by {runs} earlier run{'s' if runs > 1 else ''}" if runs else ""


def duration(seconds: float) -> str:
    """Seconds in the unit a person would choose."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _has_gpu() -> bool:
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
