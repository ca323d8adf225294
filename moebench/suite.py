"""A suite: TOML files and command-line overrides, as a lazy stream of Blocks of Points. No torch.

Loading walks the whole plan once: it finds values that survive in no point,
counts, and keeps an even sample for the estimate. Blocks are built only when
they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from operator import itemgetter
from typing import Literal, NamedTuple, TypeVar

from moebench import expand
from moebench.axes import AXES, CUSTOM, Value, shown
from moebench.expand import Cell, Survey
from moebench.point import Block, Variant, digest
from moebench.suite_file import MAX_FAULTS, Budget, Modes, SuiteError, SuiteFile, parse, read_source, shipped
from moebench.sweep import Sweep, Values, files_named, override_key, read_overrides, read_sweep, read_values

__all__ = ["Budget", "Modes", "PlanSize", "Suite", "SuiteError", "load_suite", "parse_shard", "shard", "shipped"]

DeviceKind = Literal["cpu", "cuda"]
Item = TypeVar("Item")

# Two ways to one layer (8 experts split in two, 16 experts) are one problem: granularity is no part of it.
IDENTITY = itemgetter(*(name for name, axis in AXES.items() if axis.part == "layer" and name != "granularity"))
PROBLEM = itemgetter(*expand.PROBLEM_AXES)


class PlanSize(NamedTuple):
    """How many points and blocks there are."""

    points: int
    blocks: int


@dataclass(frozen=True)
class Suite:
    """What is to be measured, and why.

    Attributes:
        name: of the file, or of several joined by "+".
        question: what it answers.
        energy: whether energy is measured.
        timer, cache: as in `SuiteFile`.
        seed: of weights, inputs, routing and the shuffling of rounds.
        replicates: repeats in fresh workers.
        budget: how long measuring may take.
        modes: threads, cores and dtype modes of the process that measures.
        text: the files as read.
        overrides: axis -> values of `--set`.
        joined: providers that race beside the suite's own in every sweep.
        files: router files and traces that the sweeps name -> digest of what they hold.
        digest: changes when text or overrides do.
        sweeps: what `blocks` walks.
        surveys: device kind -> counts and an even sample of its cells.
    """

    name: str
    question: str
    energy: bool
    timer: str
    cache: str
    seed: int
    replicates: int
    budget: Budget
    modes: Modes
    text: str
    overrides: dict[str, tuple[Value, ...]]
    joined: tuple[str, ...]
    files: dict[str, str]
    digest: str
    sweeps: tuple[Sweep, ...] = field(repr=False)
    surveys: dict[DeviceKind, Survey] = field(repr=False, compare=False)

    def blocks(self, device_kind: DeviceKind) -> Iterator[Block]:
        """Blocks in order, each built when it is asked for; a point that stands in several sweeps comes once.

        Memory is flat, but where sweeps can repeat each other's points: then
        about 150 bytes are kept for each problem.
        """
        return expand.build(_cells(_on(self.sweeps, device_kind), expand.expand))

    def count(self, device_kind: DeviceKind) -> PlanSize:
        """Points and blocks on such a device."""
        return PlanSize(self.surveys[device_kind].points, self.surveys[device_kind].blocks)

    def sample(self, device_kind: DeviceKind) -> list[Block]:
        """An even sample of at most 2 * `expand.SAMPLE` blocks, in order."""
        return list(expand.build(self.surveys[device_kind].sample))


def load_suite(
    sources: Sequence[str],
    overrides: Mapping[str, Sequence[str]] | None = None,
    *,
    add_providers: Sequence[str] = (),
) -> Suite:
    """Read shipped suites (by name) and files (by path), several as one, with overrides.

    Args:
        sources: at least one. Their sweeps follow each other; questions are joined; energy if any asks for it;
            the longest budget and most replicates hold; `seed` is each file's own, and the first's for the suite.
        overrides: axis -> values as text, replacing that axis in every sweep. A value has to survive in one
            sweep at least; sweeps that the overrides leave empty are left out.
        add_providers: they race beside the suite's own, in every sweep.

    Raises:
        SuiteError: with every fault, one line each.
    """
    faults: list[str] = []
    chosen = read_overrides(overrides or {}, faults)
    texts, parts = _read_all(sources, faults)
    joining = _joining(add_providers, faults)
    sweeps = [sweep for file, part in parts for sweep in _sweeps(file, part, chosen, joining, faults)]
    faults = faults or expand.too_large(sweeps)
    if faults:
        raise SuiteError(faults)
    surveys, faults = _walk_all(sweeps, chosen)
    if faults:
        raise SuiteError(faults)
    files = [part for _, part in parts]
    named = files_named(sweeps)
    for key in ("modes", "timer", "cache"):
        other = next((file for file, part in parts if getattr(part, key) != getattr(files[0], key)), None)
        if other is not None:
            raise SuiteError([f"{parts[0][0]} and {other}: {key}: differ, and one run has one for all"])
    return Suite(
        name="+".join(dict.fromkeys(part.name for part in files)),
        question=" ".join(dict.fromkeys(part.question for part in files)),
        energy=any(part.energy for part in files),
        timer=files[0].timer,
        cache=files[0].cache,
        seed=files[0].seed,
        replicates=max(part.replicates for part in files),
        budget=_longest([part.budget for part in files]),
        modes=files[0].modes,
        text="\n".join(texts),
        overrides=chosen,
        joined=tuple(joining),
        files=named,
        digest=digest([texts, _plain(chosen), list(joining), list(named.values())]),
        sweeps=tuple(sweeps),
        surveys=surveys,
    )


def _plain(chosen: Values) -> dict[str, list[Value]]:
    return {name: list(values) for name, values in chosen.items()}


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n".

    Raises:
        ValueError: it is not two whole numbers with 1 <= i <= n.
    """
    i, _, n = text.partition("/")
    if not (i.isascii() and i.isdigit() and n.isascii() and n.isdigit() and 1 <= int(i[:9]) <= int(n[:9])):
        raise ValueError(f"shard {shown(text)} is not i/n with 1 <= i <= n, such as 1/4")
    return int(i[:9]), int(n[:9])


def shard(blocks: Iterable[Item], i: int, n: int) -> Iterator[Item]:
    """Every n-th block, from the i-th on (1 <= i <= n): the n shards are disjoint and together the whole."""
    if not 1 <= i <= n:
        raise ValueError(f"shard {i}/{n} is not i/n with 1 <= i <= n")
    return islice(blocks, i - 1, None, n)


def _read_all(sources: Sequence[str], faults: list[str]) -> tuple[list[str], list[tuple[str, SuiteFile]]]:
    if not sources:
        raise SuiteError([f"no suite is named (shipped: {', '.join(shipped())})"])
    texts, parts = [], []
    for source in dict.fromkeys(sources):
        try:
            file, text = read_source(source)
            parts.append((file, parse(file, text)))
            texts.append(text)
        except SuiteError as error:
            faults += error.faults
    return texts, parts


def _joining(names: Sequence[str], faults: list[str]) -> list[str]:
    joining: list[str] = []
    for name in dict.fromkeys(names):
        try:
            joining.append(str(AXES["provider"].read(name)))
        except ValueError as error:
            faults.append(f"--provider: {error}")
    return joining


def _sweeps(file: str, part: SuiteFile, chosen: Values, joining: Sequence[str], faults: list[str]) -> list[Sweep]:
    defaults = read_values(f"{file}: defaults", part.defaults, faults)
    read = [
        read_sweep(f"{file}: sweep {number}", table, defaults, part.seed, chosen, joining, faults)
        for number, table in enumerate(part.sweep, 1)
    ]
    return [sweep for sweep in read if sweep]


def _walk_all(sweeps: list[Sweep], chosen: Values) -> tuple[dict[DeviceKind, Survey], list[str]]:
    """The survey of each kind of device, and what is at fault in the sweeps."""
    faults: dict[str, None] = {}
    alive: dict[str, set[expand.RowId]] = {sweep.label: set() for sweep in sweeps}

    def walk(sweep: Sweep) -> Iterator[Cell]:
        try:
            yield from expand.expand(sweep, alive[sweep.label])
        except ArithmeticError as error:
            faults[f"{sweep.label}: where: {shown(sweep.where)} cannot be computed everywhere: {error}"] = None

    surveys: dict[DeviceKind, Survey] = {"cpu": expand.survey(_cells(_on(sweeps, "cpu"), walk))}
    same = all(sweep.device is None for sweep in sweeps)
    surveys["cuda"] = surveys["cpu"] if same else expand.survey(_cells(_on(sweeps, "cuda"), walk))
    if faults:
        return surveys, list(faults)
    return surveys, _missed(sweeps, alive, chosen) if chosen else [
        fault for sweep in sweeps for fault in _dead(sweep, alive[sweep.label])
    ]


def _missed(sweeps: list[Sweep], alive: Mapping[str, set[expand.RowId]], chosen: Values) -> list[str]:
    """Overriding values that no point has."""
    rows = [sweep.choices[number].rows[index] for sweep in sweeps for number, index in alive[sweep.label]]
    found = {pair for row in rows for pair in row.items()}
    missed = {name: [value for value in values if (name, value) not in found] for name, values in chosen.items()}
    why = "is in no point: `where` or the layer's own rules leave it out everywhere"
    return [
        f"{override_key(name, values)}: {why}{_because(sweeps, name, values)}"
        for name, values in missed.items()
        if values
    ]


def _because(sweeps: list[Sweep], name: str, values: Sequence[Value]) -> str:
    """The first sweep's reason, where no layer of it can have the first of the values."""
    reasons = (expand.layer_reasons(sweep, {name: values[0]}) for sweep in sweeps)
    found = next((reason for reason in reasons if reason), None)
    return f"; {found}" if found else ""


def _dead(sweep: Sweep, alive: set[expand.RowId]) -> list[str]:
    """Rows of a file that no point has."""
    if not alive:
        return [f"{sweep.label}: leaves no point: {_reason(sweep)}"]
    dead = [
        (choice, row)
        for number, choice in enumerate(sweep.choices)
        for index, row in enumerate(choice.rows)
        if (number, index) not in alive
    ]
    faults = [f"{choice.key}: {_row(row)} is in no point: {_reason(sweep, row)}" for choice, row in dead[:MAX_FAULTS]]
    rest = len(dead) - len(faults)
    return [*faults, f"{sweep.label}: {rest} more values are in no point"] if rest else faults


def _row(row: Mapping[str, Value]) -> str:
    return ", ".join(shown(value) if len(row) == 1 else f"{name} {shown(value)}" for name, value in row.items())


def _reason(sweep: Sweep, row: Mapping[str, Value] | None = None) -> str:
    """Why a row (or the whole sweep) is dead: no such layer, or `where`."""
    reasons = expand.layer_reasons(sweep, row or {})
    return reasons or f"where = {shown(sweep.where)} leaves it out everywhere"


def _longest(budgets: list[Budget]) -> Budget:
    totals = [budget.seconds_total for budget in budgets]
    return Budget(
        seconds_per_point=max(budget.seconds_per_point for budget in budgets),
        seconds_total=None if None in totals else sum(total or 0.0 for total in totals),
        min_samples=max(budget.min_samples for budget in budgets),
        deadline_seconds=max(budget.deadline_seconds for budget in budgets),
        energy_window_seconds=max(budget.energy_window_seconds for budget in budgets),
        energy_trials=max(budget.energy_trials for budget in budgets),
        energy_cool_down_seconds=max(budget.energy_cool_down_seconds for budget in budgets),
    )


def _may_repeat(sweeps: list[Sweep]) -> bool:
    """Whether a point can stand twice: in two sweeps that differ in no axis, or by two ways to one layer."""
    if any(len(sweep.values("granularity")) > 1 for sweep in sweeps):
        return True
    taken = [_taken(sweep) for sweep in sweeps]
    return not all(any(map(set.isdisjoint, one, other)) for one, other in combinations(taken, 2))


def _taken(sweep: Sweep) -> list[set[Value]]:
    """The values of each axis that can keep two sweeps apart; of the layer's axes only the model is asked."""
    unnamed = {"model": CUSTOM, **expand.PROBLEM_DEFAULTS, **expand.VARIANT_DEFAULTS}
    return [sweep.values(name) or {value} for name, value in unnamed.items()] + [
        sweep.values(name) for name in ("tokens", "provider")
    ]


def _on(sweeps: Iterable[Sweep], device_kind: DeviceKind) -> list[Sweep]:
    return [sweep for sweep in sweeps if sweep.device in (None, device_kind)]


def _cells(sweeps: list[Sweep], walk: Callable[[Sweep], Iterator[Cell]]) -> Iterator[Cell]:
    cells = (cell for sweep in sweeps for cell in walk(sweep))
    return _once(cells) if _may_repeat(sweeps) else cells


def _once(cells: Iterable[Cell]) -> Iterator[Cell]:
    """Cells without the points that came before; empty ones are left out."""
    layers: dict[tuple[Value, ...], int] = {}
    problems: dict[tuple[Value, ...], int] = {}
    seen: dict[int, tuple[Variant, ...]] = {}
    for cell in cells:
        layer = layers.setdefault(IDENTITY(cell.layer), len(layers))
        problem = problems.setdefault(PROBLEM(cell.row), len(problems))
        key = layer * expand.MAX_CELLS + problem  # there are fewer problems than cells: one number for the pair
        before = seen.get(key)
        fresh = cell.variants if before is None else _without(cell.variants, before)
        if fresh:
            seen[key] = fresh if before is None else before + fresh
            yield cell if fresh is cell.variants else cell._replace(variants=fresh)


def _without(variants: tuple[Variant, ...], before: tuple[Variant, ...]) -> tuple[Variant, ...]:
    known = set(before)
    return tuple(variant for variant in variants if variant not in known)
