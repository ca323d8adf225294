"""Data-sheet facts of accelerators (hardware.csv) and the user's own. No torch."""

from __future__ import annotations

import csv
import io
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from moebench.catalogue.names import nearest
from moebench.catalogue.textfile import read_text


@dataclass(frozen=True)
class Hardware:
    """One device, as its data sheet, its price list and its owner state it. Null: not known.

    Attributes:
        name: the row's id.
        vendor: its maker.
        fp32_dense_tflops / bf16_dense_tflops / fp8_dense_tflops: dense peaks; bf16 stands for fp16 too.
        mem_gb, mem_bw_gbs: memory in GB, its bandwidth in GB/s.
        scale_up_link, scale_up_gbs_per_dir, scale_up_domain: fast link, GB/s per direction, devices it joins.
        scale_out_gbs_per_dir_per_gpu: network, GB/s per direction and device.
        power_w, power_term: rated power and what the maker calls it; never taken for a measurement.
        measured_max_bf16_tflops: best dense GEMM reported by others.
        usd_per_gpu_hour, price_basis: rent, and where and when it was asked.
        price_usd, life_years, utilisation: an owned device: price, years of use, busy fraction (0..1].
        tariff_usd_per_kwh, pue: electricity price, facility power over device power.
        gco2_per_kwh: carbon intensity of the electricity, grams of CO2.
        match: part of the device name this row is for (user rows).
        source, notes: where the numbers come from.
    """

    name: str
    vendor: str = ""
    fp32_dense_tflops: float | None = None
    bf16_dense_tflops: float | None = None
    fp8_dense_tflops: float | None = None
    mem_gb: float | None = None
    mem_bw_gbs: float | None = None
    scale_up_link: str = ""
    scale_up_gbs_per_dir: float | None = None
    scale_up_domain: float | None = None
    scale_out_gbs_per_dir_per_gpu: float | None = None
    power_w: float | None = None
    power_term: str = ""
    measured_max_bf16_tflops: float | None = None
    usd_per_gpu_hour: float | None = None
    price_basis: str = ""
    price_usd: float | None = None
    life_years: float | None = None
    utilisation: float | None = None
    tariff_usd_per_kwh: float | None = None
    pue: float | None = None
    gco2_per_kwh: float | None = None
    match: str = ""
    source: str = ""
    notes: str = ""

    def peak_tflops(self, precision: str) -> float | None:
        """Dense data-sheet peak at "fp32", "bf16", "fp16", a "w4a16..." scheme (whose products are of 16 bits), or an
        "fp8..." scheme; null: not stated.
        """
        if precision == "fp32":
            return self.fp32_dense_tflops
        if precision in ("bf16", "fp16") or precision.startswith("w4a16"):
            return self.bf16_dense_tflops
        return self.fp8_dense_tflops if precision.startswith("fp8") else None


COLUMNS = tuple(field.name for field in fields(Hardware))
TEXT_COLUMNS = tuple(field.name for field in fields(Hardware) if field.type == "str")
# Least allowed value of a number, and whether it may be reached.
DIVISORS = ("utilisation", "life_years", "fp32_dense_tflops", "bf16_dense_tflops", "fp8_dense_tflops", "mem_bw_gbs")
AT_LEAST = {**dict.fromkeys(DIVISORS, (0.0, False)), "pue": (1.0, True)}
AT_MOST = {"utilisation": 1.0}

# Device names as drivers report them -> rows. Exact, since "H100", "H100 PCIe" and "H100 NVL" are different devices.
DEVICE_NAMES = {
    "nvidia a100-sxm4-40gb": "A100-SXM-40GB",
    "nvidia a100-sxm4-80gb": "A100-SXM-80GB",
    "nvidia a100-sxm-80gb": "A100-SXM-80GB",
    "nvidia a100 80gb pcie": "A100-PCIe-80GB",
    "nvidia a100-pcie-80gb": "A100-PCIe-80GB",
    "nvidia h100 80gb hbm3": "H100-SXM-80GB",
    "nvidia h100 sxm5 80gb": "H100-SXM-80GB",
    "nvidia h100 pcie": "H100-PCIe-80GB",
    "nvidia h800": "H800-SXM-80GB",
    "nvidia h200": "H200-SXM-141GB",
    "nvidia h20": "H20-96GB",
    "nvidia b200": "B200-SXM-180GB",
    "nvidia gb200": "GB200-NVL72",
    "amd instinct mi300x": "MI300X",
    "amd instinct mi300x oam": "MI300X",
    "amd instinct mi325x": "MI325X",
    "amd instinct mi325x oam": "MI325X",
    "nvidia l40s": "L40S",
    "nvidia geforce rtx 4090": "RTX-4090",
    "nvidia geforce rtx 5090": "RTX-5090",
    "nvidia a10g": "A10G",
    "tpu v4": "TPU-v4",
    "tpu v5e": "TPU-v5e",
    "tpu v5 lite": "TPU-v5e",
    "tpu v5p": "TPU-v5p",
}


def hardware_table(extra: Path | None = None) -> dict[str, Hardware]:
    """The shipped rows by name, with the user's rows (first, and in place of a shipped row of the same name).

    Args:
        extra: a .csv or .toml file of rows (TOML: an array of tables named `hardware`), or None.

    Raises:
        ValueError: the file cannot be read, or a row has an unknown column or an impossible value.
    """
    shipped = {row.name: row for row in _shipped()}
    if extra is None:
        return shipped
    own = _read(extra)
    return own | {name: row for name, row in shipped.items() if name not in own}


def match(device_name: str, table: Mapping[str, Hardware]) -> Hardware | None:
    """The row for a device as its driver names it; None where there is none (never a neighbour's).

    A row whose `match` is part of the name comes first, then a row of that very name, then `DEVICE_NAMES`.
    """
    lowered = " ".join(device_name.lower().split())
    for row in table.values():
        if row.match and row.match.lower() in lowered:
            return row
    for row in table.values():
        if row.name.lower() == lowered:
            return row
    return table.get(DEVICE_NAMES.get(lowered, ""))


def hardware_row(name: str, table: Mapping[str, Hardware]) -> Hardware:
    """The row of a name, in any case.

    Raises:
        ValueError: there is none.
    """
    found = next((row for row in table.values() if row.name.lower() == name.lower()), None)
    if found is None:
        holding = [row for row in table if name.lower() in row.lower()]
        near = f"; did you mean {', '.join(holding)}?" if holding else nearest(name, tuple(table))
        raise ValueError(f"hardware {name!r} is not in the table{near} (allowed: a name of `moebench list hardware`)")
    return found


def _shipped() -> list[Hardware]:
    text = files("moebench.catalogue").joinpath("hardware.csv").read_text(encoding="utf-8")
    return [
        checked_row(f"hardware.csv: row {number}", row)
        for number, row in enumerate(csv.DictReader(text.splitlines()), 2)
    ]


def _read(path: Path) -> dict[str, Hardware]:
    if path.suffix.lower() not in (".csv", ".toml"):
        raise ValueError(f"{path}: a hardware file is .csv or .toml")
    text = read_text(path)
    numbered = _csv_rows(path, text) if path.suffix.lower() == ".csv" else _toml_rows(path, text)
    table: dict[str, Hardware] = {}
    for number, values in numbered:
        row = checked_row(f"{path}: row {number}", values)
        if row.name in table:
            raise ValueError(f"{path}: row {number}: name {row.name!r} appears twice")
        table[row.name] = row
    if not table:
        raise ValueError(f"{path}: no hardware rows")
    return table


def _csv_rows(path: Path, text: str) -> list[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: not CSV: {error}") from None
    for number, row in enumerate(rows, 2):
        if None in row:
            raise ValueError(f"{path}: row {number}: more cells than columns")
    return list(enumerate(rows, 2))


def _toml_rows(path: Path, text: str) -> list[tuple[int, Mapping[str, Any]]]:
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    rows = data.get("hardware")
    if set(data) != {"hardware"} or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected [[hardware]] tables and nothing else")
    return list(enumerate(rows, 1))


def checked_row(place: str, values: Mapping[str, Any]) -> Hardware:
    """A row from its columns; blank ones are not known.

    Raises:
        ValueError: an unknown column or an impossible value; the line begins with `place`.
    """
    for column in values:
        if column not in COLUMNS:
            raise ValueError(f"{place}: unknown column {column!r}{nearest(column, COLUMNS)}")
    given = {column: value for column, value in values.items() if value is not None and str(value).strip()}
    if not given.get("name"):
        raise ValueError(f"{place}: name is missing")
    return Hardware(**{column: _cell(place, column, value) for column, value in given.items()})


def _cell(place: str, column: str, value: Any) -> Any:
    if column in TEXT_COLUMNS:
        if not isinstance(value, str):
            raise ValueError(f"{place}: {column} is {value!r}; it must be text")
        return value.strip()
    number = _number(value)
    least, reached = AT_LEAST.get(column, (0.0, True))
    fits = number is not None and (number >= least if reached else number > least)
    if number is None or not fits or number > AT_MOST.get(column, math.inf):
        upper = f", at most {AT_MOST[column]:g}" if column in AT_MOST else ""
        lower = f"at least {least:g}" if reached else f"more than {least:g}"
        raise ValueError(f"{place}: {column} is {str(value)[:60]!r}; it must be a number, {lower}{upper}")
    return number


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
