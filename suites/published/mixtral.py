"""One Mixtral-8x7B layer beside vLLM's published latencies: S-MBU and S-MFU in the same table.

The public latencies stand in vllm_h200.csv with their source; their utilisation is computed here as ours is, by
`moebench.work` and the same row of the hardware table: experts only, bf16, balanced traffic.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import pandas as pd
from moebench_suites.published.pages import MARK, table, words
from moebench_suites.published.runs import Published, commands, counting, gpus, made_with, rows_of

from moebench.analyse import numbers
from moebench.catalogue.hardware import Hardware, hardware_table, match
from moebench.catalogue.models import resolve_layer
from moebench.derive import performance
from moebench.point import Problem, Variant
from moebench.work import point_work

SUITE, MODEL = "h200-mixtral", "mixtral-8x7b"
TOKENS = (1, 16, 16384)
PUBLIC = "vllm_h200.csv"
OURS = "triton"


@dataclass(frozen=True)
class Public:
    """One public latency of the layer's experts."""

    system: str
    device: str
    tokens: int
    latency_ms: float
    source: str


@dataclass(frozen=True)
class Use:
    """What a latency makes of the data sheet's peaks, 0..1, or null without one."""

    latency_ms: float
    s_mbu: float | None
    s_mfu: float | None
    flagged: bool = False


def public_figures() -> list[Public]:
    """The rows of vllm_h200.csv."""
    text = files(__package__).joinpath(PUBLIC).read_text(encoding="utf-8")
    return [
        Public(row["system"], row["device"], int(row["tokens"]), float(row["latency_ms"]), row["source"])
        for row in csv.DictReader(text.splitlines())
    ]


def use_of(latency_ms: float, tokens: int, hardware: Hardware) -> Use:
    """Of Mixtral's experts, balanced: min(8, 2·T) of them are active."""
    layer = resolve_layer(MODEL)[1].layer
    problem, variant = Problem(MODEL, layer, tokens), Variant("", "bf16", scope="experts")
    active = float(min(layer.routed_experts, tokens * layer.top_k))
    found = performance(latency_ms, point_work(problem, variant, active_experts=active), problem, variant, hardware)
    return Use(latency_ms, found["s_mbu"], found["s_mfu"])


def mixtral_block(published: Sequence[Published]) -> str:
    """One table for each device with a run; that of the public figures' device stands there without one, too."""
    public = public_figures()
    device = public[0].device
    names = [device, *(name for name in gpus(published) if name != device and counting(published, name, [SUITE]))]
    parts = [_of_device(published, name, public if name == device else []) for name in names]
    return "\n\n".join([*parts, _sources(public)])


def _of_device(published: Sequence[Published], device: str, public: Sequence[Public]) -> str:
    runs = counting(published, device, [SUITE])
    rows = _layer_rows(rows_of(runs)) if runs else None
    lines = [_line(words(f"{public[0].system}, public"), _public_uses(public))] if public else []
    if rows is None or rows.empty:
        lines.append([f"ours (`{OURS}`)", *["not measured"] * len(TOKENS), *[""] * 2 * len(TOKENS)])
    else:
        lines += [_line(_name(provider), _uses(arms)) for provider, arms in rows.groupby("provider", sort=False)]
    made = f": {words(made_with(runs), 300)}, {', '.join(commands(runs))}" if runs else ""
    heads = [f"T {tokens:,}: {what}" for what in ("ms", "S-MBU %", "S-MFU %") for tokens in TOKENS]
    return f"**{words(device)}**{made}\n\n{table(['arm', *heads], lines, numbers=len(heads))}"


def _layer_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The arms of the layer, ours first, then as the suite names them."""
    wanted = rows[(rows["model"] == MODEL) & (rows["scope"] == "experts") & (rows["direction"] == "forward")
                  & (rows["precision"] == "bf16") & (rows["traffic"] == "balanced") & rows["capacity_factor"].isna()
                  & (rows["role"] == "arm") & (rows["replicate"] == 0)]  # fmt: skip
    return wanted.sort_values("provider", key=lambda names: names != OURS, kind="stable")


def _name(provider: str) -> str:
    return f"ours (`{OURS}`)" if provider == OURS else words(provider)


def _public_uses(public: Sequence[Public]) -> dict[int, Use | str]:
    hardware = match(public[0].device, hardware_table())
    assert hardware is not None, public[0].device
    return {each.tokens: use_of(each.latency_ms, each.tokens, hardware) for each in public}


def _uses(arms: pd.DataFrame) -> dict[int, Use | str]:
    """Tokens -> what was measured, or what became of the row."""
    found: dict[int, Use | str] = {}
    for row in arms.itertuples():
        if row.status == "measured":
            shares = (None if pd.isna(share) else share for share in (row.s_mbu, row.s_mfu))
            found[row.tokens] = Use(row.latency_ms, *shares, flagged=len(row.flags) > 0)
        else:
            found[row.tokens] = row.status.replace("_", " ")
    return found


def _line(name: str, uses: dict[int, Use | str]) -> list[str]:
    found = [uses.get(tokens, "not measured") for tokens in TOKENS]
    latencies = [_latency(use) if isinstance(use, Use) else words(use) for use in found]
    shares = [[_percent(getattr(use, name), digits) if isinstance(use, Use) else "" for use in found]
              for name, digits in (("s_mbu", 1), ("s_mfu", 2))]  # fmt: skip
    return [name, *latencies, *shares[0], *shares[1]]


def _latency(use: Use) -> str:
    return numbers.significant(use.latency_ms, 4) + (f" {MARK}" if use.flagged else "")


def _percent(share: float | None, digits: int) -> str:
    return "—" if share is None else f"{100 * share:.{digits}f}"


def _sources(public: Sequence[Public]) -> str:
    hardware = match(public[0].device, hardware_table())
    assert hardware is not None
    peaks = f"{hardware.mem_bw_gbs:,.0f} GB/s and {hardware.bf16_dense_tflops:,.0f} TFLOP/s"
    return (
        f"The experts of one layer (E 8, K 2, D 4,096, F 14,336; no router), bf16, balanced. The public latencies were "
        f"measured by others in their own way: {words(public[0].source, 300)}. All shares are computed here, by one "
        f"formula, on an H200 against {peaks}. {MARK} flagged: a remark about the number stands in its run."
    )
