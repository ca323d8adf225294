"""Names for the rows of a table: what was computed (problem), how (variant), and along which line (family).

A family is a problem with its token count left open: the line a chart draws over T.
Names carry only what tells rows of this table apart, so they stay short; unsaid are dropless and forward.
"""

from __future__ import annotations

import pandas as pd

FAMILY = [
    "run_id", "suite", "device", "model", "hidden_size", "expert_ffn_size", "routed_experts", "top_k", "shared_experts",
    "router", "router_mode", "traffic", "direction", "seed",
]  # fmt: skip
PROBLEM = [*FAMILY, "tokens", "phase"]
VARIANT = [
    "provider", "precision", "capacity_factor", "capacity_rounding", "drop_order", "layout", "n_devices",
]  # fmt: skip
SHAPE = ["hidden_size", "expert_ffn_size", "routed_experts", "top_k", "shared_experts"]
CUSTOM = "custom"  # the model of plain numbers: its shape is its name
# Rows that were sampled together, in one process: the only ones whose ratio means anything.
BLOCK = ["run_id", "block_id", "replicate"]


def name_rows(table: pd.DataFrame) -> pd.DataFrame:
    """A copy with columns `variant`, `family`, `problem` (texts) and `block` (int64 codes of `BLOCK`)."""
    named = table.reset_index(drop=True)
    named["variant"] = _labels(named, VARIANT, _variant_text)
    named["family"] = _labels(named, FAMILY, _family_text)
    tokens = named["tokens"].map(lambda count: f"{count:,} token{'s' if count != 1 else ''}").astype(object)
    phases = named.groupby(["family", "tokens"], dropna=False)["phase"].transform("nunique")
    phase = (" · " + named["phase"].astype(object)).where(phases > 1, "")
    named["problem"] = named["family"] + " · " + tokens + phase
    named["block"] = named.groupby(BLOCK, sort=False, dropna=False).ngroup()
    return named


def varying(table: pd.DataFrame, columns: list[str]) -> set[str]:
    """Those of `columns` that hold more than one value (null counts as one)."""
    return {name for name in columns if table[name].nunique(dropna=False) > 1}


def _labels(table: pd.DataFrame, columns: list[str], text: object) -> pd.Series:
    """`text(row, varying columns)` for each distinct combination of `columns`, spread back over the rows."""
    assert callable(text)
    codes = table.groupby(columns, sort=False, dropna=False).ngroup()
    first = table.loc[~codes.duplicated(), columns]
    changing = _changing(table, columns)
    names = {code: text(row, changing) for code, row in zip(codes[first.index], first.to_dict("records"), strict=True)}
    return codes.map(names).astype(object)


def _changing(table: pd.DataFrame, columns: list[str]) -> set[str]:
    if "provider" in columns:
        # The yardsticks' own precision or capacity must not lengthen the names of the arms.
        arms = table[table["role"] == "arm"]
        return varying(arms if len(arms) else table, columns)
    several_shapes = table[["model", *SHAPE]].drop_duplicates()["model"].drop_duplicates(keep=False)
    published = table.loc[table["model"] != CUSTOM, "model"]
    ambiguous = not published.isin(several_shapes).all()
    return varying(table, columns) | ({"shape"} if ambiguous else set())


def _variant_text(row: dict[str, object], changing: set[str]) -> str:
    parts = [str(row["provider"])]
    if "precision" in changing:
        parts.append(str(row["precision"]))
    factor = row["capacity_factor"]
    if "capacity_factor" in changing and not pd.isna(factor):  # type: ignore[call-overload]
        parts.append(f"cap {factor:g}")
    if not pd.isna(factor):  # type: ignore[call-overload]
        parts += [str(row[name]) for name in ("capacity_rounding", "drop_order") if name in changing]
    if "layout" in changing:
        parts.append(str(row["layout"]))
    if "n_devices" in changing:
        parts.append(f"{row['n_devices']} devices")
    return " ".join(parts)


def _family_text(row: dict[str, object], changing: set[str]) -> str:
    parts = [str(row["model"])]
    if row["model"] == CUSTOM or "shape" in changing:
        shared = f" + {row['shared_experts']} shared" if row["shared_experts"] else ""
        parts.append(
            f"{row['routed_experts']} experts top-{row['top_k']} {row['hidden_size']}×{row['expert_ffn_size']}{shared}"
        )
    if "router" in changing:
        parts.append(str(row["router"]))
    if "router_mode" in changing:
        parts.append(str(row["router_mode"]))
    if "traffic" in changing:
        parts.append(str(row["traffic"]))
    if row["direction"] != "forward":
        parts.append(str(row["direction"]).replace("_", " + "))
    if "seed" in changing:
        parts.append(f"seed {row['seed']}")
    parts += [str(row[name]) for name in ("device", "suite") if name in changing]
    if "run_id" in changing:
        parts.append(f"run {row['run_id']}")
    return " · ".join(parts)
