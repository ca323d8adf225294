"""The table of targets: worst, median and best ratio of each, and whether the worst reaches it.

Printed numbers are rounded away from the target, so that 0.8499 is never read as 0.85. A point that counts and has no
ratio keeps a target from being met.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from statistics import median

from moebench_suites.published.pages import table, words
from moebench_suites.published.ratios import Missing, Ratio, points_of
from moebench_suites.published.runs import Published, code, commands, counting, gpus, made_with, rows_of
from moebench_suites.published.target_table import Target

HEADS = ("target", "wanted", "verdict", "repeated by", "worst, with its 95 % interval", "median", "best", "points")
NO_GPU = "not measured: no run on a GPU is published"


def targets_block(published: Sequence[Published], targets: Sequence[Target]) -> str:
    """One table for each GPU with published runs; without any, one that says so."""
    devices = gpus(published)
    if not devices:
        return _table(targets, lambda target: [NO_GPU, _would_repeat(target), "", "", "", "0"])
    return "\n\n".join(_of_device(published, targets, device) for device in devices)


def _of_device(published: Sequence[Published], targets: Sequence[Target], device: str) -> str:
    asked = sorted({suite for target in targets for suite in target.suites})
    runs = counting(published, device, asked)
    made = f": {made_with(runs)}" if runs else ""
    cells = _table(targets, lambda target: _cells(target, counting(runs, device, target.suites)))
    return f"**{words(device)}**{words(made, 300)}\n\n{cells}"


def _table(targets: Sequence[Target], cells: Callable[[Target], list[str]]) -> str:
    return table(HEADS, ([target.text, _wanted(target), *cells(target)] for target in targets), numbers=3)


def _cells(target: Target, runs: Sequence[Published]) -> list[str]:
    found = points_of(target, rows_of(runs)) if runs and target.suites else []
    ratios = sorted((each for each in found if isinstance(each, Ratio)), key=lambda ratio: ratio.value)
    missing = [each for each in found if isinstance(each, Missing)]
    verdict = "; ".join(
        filter(None, [_verdict(target, ratios, missing, runs), _flagged(ratios), _reason(target, ratios, missing)])
    )
    repeat = ", ".join(commands(runs)) or _would_repeat(target)
    if not ratios:
        return [verdict, repeat, "", "", "", "0"]
    worst, best = (ratios[0], ratios[-1]) if target.at_least is not None else (ratios[-1], ratios[0])
    middle = median(ratio.value for ratio in ratios)
    return [verdict, repeat, f"{_interval(target, worst)} at {worst.point}", rounded(target, middle),
            rounded(target, best.value), str(len(ratios))]  # fmt: skip


def _verdict(target: Target, ratios: Sequence[Ratio], missing: Sequence[Missing], runs: Sequence[Published]) -> str:
    if not ratios:
        return f"not measured: {_why_none(target, missing, runs)}"
    met, count = sum(target.met_by(ratio.value) for ratio in ratios), len(ratios) + len(missing)
    lacking = f", {len(missing)} without a ratio ({_most(each.reason for each in missing)})" if missing else ""
    if met == count:
        return "**met**"
    return f"partly: {met} of {count}{lacking}" if met else f"not met: 0 of {count}{lacking}"


def _why_none(target: Target, missing: Sequence[Missing], runs: Sequence[Published]) -> str:
    if missing:
        return f"{len(missing)} without a ratio ({_most(each.reason for each in missing)})"
    if not target.suites:
        return "no suite times it alone"
    if not runs:
        return f"no run of {' or '.join(target.suites)} on this device is published"
    return f"no such row in {' and '.join(sorted(words(run.manifest.suite) for run in runs))}"


def _flagged(ratios: Sequence[Ratio]) -> str:
    """Flagged rows count, and are named."""
    flagged = [ratio for ratio in ratios if ratio.flags]
    if not flagged:
        return ""
    counts = Counter(flag for ratio in flagged for flag in ratio.flags)
    said = ", ".join(f"{words(flag)} {count}" for flag, count in sorted(counts.items()))
    return f"flagged {len(flagged)} of {len(ratios)}: {said}"


def _reason(target: Target, ratios: Sequence[Ratio], missing: Sequence[Missing]) -> str:
    met = bool(ratios) and not missing and all(target.met_by(ratio.value) for ratio in ratios)
    return "" if met else target.why


def _most(reasons: Iterable[str]) -> str:
    """The most frequent reason, and how many others there are."""
    ((first, _), *others) = sorted(Counter(reasons).items(), key=lambda each: (-each[1], each[0]))
    return first + (f"; other reasons: {len(others)}" if others else "")


def _wanted(target: Target) -> str:
    return f"≥ {target.at_least:g}" if target.at_least is not None else f"≤ {target.at_most:g}"


def _would_repeat(target: Target) -> str:
    first, *others = [*target.suites, ""]
    if not first:
        return "—"
    return code(f"moebench run suite {first}") + (f" (or {', '.join(others[:-1])})" if others[:-1] else "")


def _interval(target: Target, ratio: Ratio) -> str:
    text = rounded(target, ratio.value)
    if math.isnan(ratio.low):
        return f"{text} (too few rounds for an interval)"
    return f"{text} ({rounded(target, ratio.low)}–{rounded(target, ratio.high)})"


def rounded(target: Target, value: float) -> str:
    """Three decimals (of µs one), never rounded towards the target."""
    step = Decimal("0.1") if target.measure == "total_us" else Decimal("0.001")
    rounding = ROUND_FLOOR if target.at_least is not None else ROUND_CEILING
    return str(Decimal(repr(float(value))).quantize(step, rounding))
