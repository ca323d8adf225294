"""Print figures (PDF and PNG) by seaborn: radar, latency over tokens, Pareto fronts, roofline.

One figure of each kind a run; panels are the families (layer and traffic) with most rows, at most `PANELS`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moebench.analyse import NOISE, Cap, Run, fronts, load_runs
from moebench.point import SCOPES
from moebench.report import findings
from moebench.report.html import joined

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

PANELS = 4
# Okabe and Ito's colours, yellow left out (too light on paper).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "D", "^", "X", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
FORMATS = ("pdf", "png")


def write_figures(runs: Sequence[Path], directory: Path) -> list[Path]:
    """Write the print figures of these run directories; what has no data is not drawn.

    Returns:
        The files written: `<run>-<kind>.pdf` and `.png`.

    Raises:
        ValueError: a directory is not a run.
    """
    loaded = load_runs(runs)
    table, systems = joined(loaded, None)
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for run, system in zip(loaded, systems, strict=True):
        rows = table[table["run_id"] == run.manifest.run_id]
        for kind, figure in figures(rows, run, system):
            written += save(figure, directory / f"{_file_name(run.manifest.run_id)}-{kind}")
    return written


def figures(rows: pd.DataFrame, run: Run, system: Cap | None) -> Iterator[tuple[str, Figure]]:
    """(kind, figure) of a run for each kind that has data.

    Args:
        rows: of this run, from `joined`.
    """
    for kind, draw in _kinds(rows, run, system).items():
        figure = _styled(draw)
        if figure is not None:
            yield kind, figure


def _kinds(rows: pd.DataFrame, run: Run, system: Cap | None) -> dict[str, Callable[[], Figure | None]]:
    looks = _looks(rows)
    arms = _widest(rows)
    return {
        "radar": lambda: _radar(system, rows, looks) if system else None,
        "latency": lambda: _panels(arms, looks, _latency),
        "pareto": lambda: _panels(_largest_tokens(arms), looks, _pareto),
        "roofline": lambda: _panels(arms, looks, lambda ax, part, own: _roofline(ax, part, own, run)),
    }


def _styled(draw: Callable[[], Figure | None]) -> Figure | None:
    """Draw under seaborn's style, leaving matplotlib's settings as they were and opening no window."""
    import matplotlib as mpl
    import seaborn as sns

    with mpl.rc_context(), sns.axes_style("whitegrid"), sns.plotting_context("paper"):
        # Text stays text in the PDF, and a dollar sign in a name stays a dollar sign.
        mpl.rcParams.update({"pdf.fonttype": 42, "text.parse_math": False, "axes.spines.top": False})
        return draw()


def save(figure: Figure, stem: Path, formats: Sequence[str] = FORMATS, dpi: int = 200) -> list[Path]:
    """Write `<stem>.<format>` for each format."""
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in formats]
    for path in paths:
        figure.savefig(path, dpi=dpi, bbox_inches="tight")
    return paths


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _widest(rows: pd.DataFrame) -> pd.DataFrame:
    """Timed arms of the widest scope: the whole layer, else its experts, else the first of its stages."""
    timed = rows[(rows["status"] == "measured") & (rows["role"] == "arm") & (rows["replicate"] == 0)]
    return next((part for scope in SCOPES if len(part := timed[timed["scope"] == scope])), timed.iloc[:0])


def _largest_tokens(arms: pd.DataFrame) -> pd.DataFrame:
    return arms[arms["tokens"] == arms.groupby("family")["tokens"].transform("max")]


def _looks(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Colour and marker by provider, dash by variant of it."""
    arms = rows[rows["role"] == "arm"].drop_duplicates("variant")
    place = pd.factorize(arms["provider"])[0]
    sibling = arms.groupby("provider").cumcount()
    return {
        str(variant): {
            "color": PALETTE[at % len(PALETTE)],
            "marker": MARKERS[(at + 3 * which) % len(MARKERS)],
            "linestyle": DASHES[(which + at // len(PALETTE)) % len(DASHES)],
        }
        for variant, at, which in zip(arms["variant"], place, sibling, strict=True)
    }


def _panels(
    arms: pd.DataFrame, looks: dict[str, Any], draw: Callable[[Axes, pd.DataFrame, dict[str, Any]], None]
) -> Figure | None:
    """One panel for each of the families with most rows; one legend for all."""
    families = arms["family"].value_counts(sort=False).nlargest(PANELS).index
    if families.empty:
        return None
    across = min(2, len(families))
    down = -(-len(families) // across)
    figure = _new_figure(3.6 * across + 1.2, 2.9 * down)
    grid = figure.subplots(down, across, squeeze=False)
    for ax, family in zip(grid.flat, families, strict=False):
        draw(ax, arms[arms["family"] == family], looks)
        _log_ticks(ax.yaxis)
        ax.set_title(textwrap.fill(str(family), 36), fontsize=8.5, loc="left")
    for ax in list(grid.flat)[len(families) :]:
        ax.remove()
    _legend(figure, list(grid.flat)[: len(families)])
    return figure


def _legend(figure: Figure, axes: list[Axes]) -> None:
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)


def _latency(ax: Axes, part: pd.DataFrame, looks: dict[str, Any]) -> None:
    for variant, rows in part.sort_values("tokens").groupby("variant", sort=False):
        middle = rows["latency_ms"]
        low, high = rows["latency_ms_low"].fillna(middle), rows["latency_ms_high"].fillna(middle)
        spread = np.array([(middle - low).clip(0), (high - middle).clip(0)])
        ax.errorbar(rows["tokens"], middle, yerr=spread, label=str(variant), markersize=4, linewidth=1.2, capsize=2,
                    **looks[str(variant)])  # fmt: skip
    scope = str(part["scope"].iloc[0]).replace("experts", "layer's experts").replace("_", " ")
    ax.set(xscale="log", yscale="log", xlabel="Tokens", ylabel=f"Latency of one {scope}, ms")
    tokens = sorted(part["tokens"].unique())
    _log_ticks(ax.xaxis)
    if len(tokens) <= 8:
        ax.set_xticks(tokens, [f"{count:,}" for count in tokens])


def _pareto(ax: Axes, part: pd.DataFrame, looks: dict[str, Any]) -> None:
    """Latency against fidelity error; filled markers are on the front."""
    on_front = fronts(part)["fidelity_error"]
    for (variant, leads), rows in part.groupby(["variant", on_front.rename("leads")], sort=False):
        look = {key: value for key, value in looks[str(variant)].items() if key != "linestyle"}
        face = look["color"] if leads else "none"
        ax.plot(rows["latency_ms"], rows["fidelity_error"], linestyle="none", markerfacecolor=face, label=str(variant),
                **look)  # fmt: skip
    ax.axhspan(0, NOISE, color="0.93", zorder=0)
    ax.set(
        xscale="log", yscale="log", xlabel=f"Latency at {part['tokens'].max():,} tokens, ms", ylabel="Fidelity error"
    )
    _log_ticks(ax.xaxis)
    low, high = part["fidelity_error"].min(), part["fidelity_error"].max()
    if low > 0:
        ax.set_ylim(low / 2, max(high, NOISE) * 2)


def _log_ticks(axis: Axis) -> None:
    """Few plain labels on a log axis: matplotlib labels every minor tick of a short one, in mathematical notation."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low)
    near = MaxNLocator(4) if decades < 0.7 else LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=8)
    axis.set_major_locator(near)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _roofline(ax: Axes, part: pd.DataFrame, looks: dict[str, Any], run: Run) -> None:
    part = part.assign(intensity=1e3 * part["tflops"] / part["gbytes_per_s"]).dropna(subset=["intensity"])
    for variant, rows in part.groupby("variant", sort=False):
        look = {key: value for key, value in looks[str(variant)].items() if key != "linestyle"}
        ax.plot(rows["intensity"], rows["tflops"], linestyle="none", markersize=4.5, label=str(variant), **look)
    ceiling = findings.ceilings([run])[run.manifest.run_id]
    for precision in part["precision"].unique() if ceiling else ():
        peak = ceiling["tflops"].get(precision)
        if peak:
            ridge = 1e3 * peak / ceiling["gbs"]
            x = np.array([min(part["intensity"].min(), ridge) / 2, ridge, max(part["intensity"].max(), ridge) * 2])
            ax.plot(x, np.minimum(x * ceiling["gbs"] / 1e3, peak), color="0.25", linewidth=1)
            ax.annotate(f"{precision} GEMM", (x[2], peak), ha="right", va="bottom", fontsize=7.5)
    ax.set(xscale="log", yscale="log", xlabel="FLOP per compulsory byte", ylabel="TFLOP/s")
    _log_ticks(ax.xaxis)


def _radar(system: Cap, rows: pd.DataFrame, looks: dict[str, Any]) -> Figure:
    drawing = findings.radar(system, dict(zip(rows["variant"], rows["provider"], strict=True)))
    names = [f"[{axis['name']}]" if axis["missing"] else axis["name"] for axis in drawing["axes"]]
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    figure = _new_figure(5.6, 3.9)
    ax: Any = figure.add_subplot(projection="polar")
    ax.set_theta_offset(np.pi / 2)
    ax.set_theta_direction(-1)
    for polygon in drawing["polygons"]:
        look = looks[polygon["variant"]]
        ratios = np.array([np.nan if ratio is None else ratio for ratio in polygon["ratios"]])
        closed = np.log2(np.append(ratios, ratios[0]))
        ax.plot(np.append(angles, angles[0]), closed, label=polygon["variant"], linewidth=1.4, markersize=4.5, **look)
    _radial_ticks(ax, [ratio for polygon in drawing["polygons"] for ratio in polygon["ratios"] if ratio])
    ax.set_xticks(angles, names, fontsize=8)
    ax.tick_params(axis="x", pad=9)
    ax.set_title(f"Ratio to {system.baseline}; farther out is better", fontsize=9, loc="left", pad=16)
    _legend(figure, [ax])
    return figure


def _radial_ticks(ax: Any, ratios: list[float]) -> None:
    low = min(-1, int(np.floor(np.log2(min(ratios)))))
    high = max(1, int(np.ceil(np.log2(max(ratios)))))
    step = -(-(high - low) // 5)
    ticks = [tick for tick in range(-8 * step, high + 1, step) if tick >= low]
    ax.set_ylim(low - 0.5, high)
    ax.set_yticks(ticks, [f"1/{2**-tick}" if tick < 0 else f"{2**tick}×" for tick in ticks], fontsize=7)


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip(".") or "run"
