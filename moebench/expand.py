"""From a sweep to its cells, one after the other: nothing is built, memory stays flat. No torch.

Layers are the outermost loop, so that their weights are made once; the rest of
the problem comes next; the variants of a problem are one cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any, NamedTuple

from moebench import shape
from moebench.axes import AXES, Value, comparable
from moebench.point import Block, Problem, Variant
from moebench.sweep import Choice, Sweep
from moebench.where import Evaluate

MAX_CELLS = 10_000_000
MAX_VARIANTS = 10_000
# Different filters are kept for this many combinations of the problem axes that a variant's condition needs.
MAX_KEPT = 4096
SAMPLE = 128

RowId = tuple[int, int]  # choice, row
Row = dict[str, Any]

# What an axis is where a suite does not name it.
PROBLEM_DEFAULTS: Row = {"traffic": "balanced", "direction": "forward", "phase": "", "seed": 0}
VARIANT_DEFAULTS: Row = {
    "precision": "fp32", "capacity_factor": "dropless", "capacity_rounding": "ceil", "drop_order": "position",
    "layout": "single", "scope": "layer",
}  # fmt: skip
PROBLEM_AXES = tuple(name for name, axis in AXES.items() if axis.part == "problem")


class Cell(NamedTuple):
    """A problem of a sweep and the variants that are left of it.

    Attributes:
        layer: the layer axes as `shape.effective` gives them; one object for all cells of a layer.
        row: axis -> value, for the layer's and the problem's axes.
        variants: never empty.
    """

    layer: shape.Layer
    row: Row
    variants: tuple[Variant, ...]


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows of a choice that agree on the problem axes: those values, and what each row says of the variant."""

    problem: Row
    variants: tuple[tuple[RowId, Row], ...]


class _Candidate(NamedTuple):
    seen: Row  # as `where` sees it
    variant: Variant
    rows: tuple[RowId, ...]


@dataclass
class Survey:
    """How much there is, and an even sample of it.

    Attributes:
        sample: every `stride`-th cell.
    """

    points: int = 0
    blocks: int = 0
    stride: int = 1
    sample: list[Cell] = field(default_factory=list)

    def add(self, cell: Cell) -> None:
        """Count a cell, and keep it if it is its turn."""
        if self.blocks % self.stride == 0:
            self.sample.append(cell)
            if len(self.sample) == 2 * SAMPLE:
                self.sample = self.sample[::2]
                self.stride *= 2
        self.blocks += 1
        self.points += len(cell.variants)


def survey(cells: Iterable[Cell]) -> Survey:
    """Walk all cells once."""
    found = Survey()
    for cell in cells:
        found.add(cell)
    return found


def too_large(sweeps: Iterable[Sweep]) -> list[str]:
    """Why a plan is refused before it is walked."""
    faults, cells = [], 0
    for sweep in sweeps:
        cells += prod(len(choice.rows) for choice in sweep.choices)
        variants = prod(max(len(group.variants) for group in _groups(0, choice)) for choice in sweep.choices)
        if variants > MAX_VARIANTS:
            what = f"found {variants:,} variants of one problem; at most {MAX_VARIANTS:,} are measured together"
            faults.append(f"{sweep.label}: {what}")
    if cells > MAX_CELLS:
        faults.append(f"the sweeps have {cells:,} combinations before `where`; at most {MAX_CELLS:,} are allowed")
    return faults


def expand(sweep: Sweep, alive: set[RowId] | None = None) -> Iterator[Cell]:
    """The cells of a sweep; rows that stand in one are added to `alive`.

    Raises:
        ArithmeticError: `where` divides by zero or overflows.
    """
    return _Walk(sweep, alive).cells()


def build(cells: Iterable[Cell]) -> Iterator[Block]:
    """Blocks of cells; neighbours of one layer share its LayerSpec."""
    layer: shape.Layer | None = None
    label, spec = "", None
    for cell in cells:
        if cell.layer is not layer:
            layer = cell.layer
            label, spec = shape.build(layer)
        assert spec is not None
        problem = {name: cell.row[name] for name in PROBLEM_AXES}
        yield Block(Problem(model=label, layer=spec, **problem), cell.variants)


class _Walk:
    """The loops over one sweep, with what they need again and again prepared."""

    def __init__(self, sweep: Sweep, alive: set[RowId] | None) -> None:
        self.alive = alive
        choices = [(_parts(choice), _groups(number, choice)) for number, choice in enumerate(sweep.choices)]
        self.outer = [groups for parts, groups in choices if "layer" in parts]
        self.inner = [groups for parts, groups in choices if "layer" not in parts and "problem" in parts]
        self.pure_variants = tuple(groups[0] for parts, groups in choices if parts == {"variant"})
        self.mixed = any("variant" in parts and len(parts) > 1 for parts, _ in choices)
        # Rows of problem axes that no cell has had yet; those with variants are marked where variants are filtered.
        pure = (group for groups in (*self.outer, *self.inner) for group in groups if not group.variants[0][1])
        self.waiting: set[_Group] = set() if alive is None else set(pure)
        self._sort_clauses(sweep)
        self.candidates: dict[tuple[_Group, ...], list[_Candidate]] = {}
        self.kept: dict[Any, tuple[Variant, ...]] = {}

    def _sort_clauses(self, sweep: Sweep) -> None:
        variant = {name for name in AXES if AXES[name].part == "variant"}
        self.of_variants = [clause.holds for clause in sweep.clauses if clause.names & variant]
        self.of_problems = [clause.holds for clause in sweep.clauses if not clause.names & variant]
        named = frozenset().union(*(clause.names for clause in sweep.clauses if clause.names & variant))
        self.coupled = sorted(named - variant)

    def cells(self) -> Iterator[Cell]:
        for outer in product(*self.outer):
            written = _merged({}, outer)
            layer = shape.effective(written)
            if isinstance(layer, str):
                continue
            start = PROBLEM_DEFAULTS | written | layer
            for inner in product(*self.inner):
                row = _merged(start.copy(), inner)
                if _all_hold(self.of_problems, row):
                    groups = outer + inner
                    variants = self._variants(groups, row)
                    if variants:
                        if self.waiting:
                            self._mark(groups)
                        yield Cell(layer, row, variants)

    def _variants(self, groups: tuple[_Group, ...], row: Row) -> tuple[Variant, ...]:
        carriers = self.pure_variants
        if self.mixed:
            carriers = (*(group for group in groups if group.variants[0][1]), *carriers)
        key = (carriers, *[row[name] for name in self.coupled])
        if key not in self.kept:
            if len(self.kept) >= MAX_KEPT:
                self.kept.clear()
            self.kept[key] = self._filtered(carriers, row)
        return self.kept[key]

    def _filtered(self, carriers: tuple[_Group, ...], row: Row) -> tuple[Variant, ...]:
        """The variants that `where` leaves; marks the rows they stand in."""
        if carriers not in self.candidates:
            if len(self.candidates) >= MAX_KEPT:
                self.candidates.clear()
            self.candidates[carriers] = _candidates(carriers)
        left = []
        row = row.copy()
        for candidate in self.candidates[carriers]:
            row.update(candidate.seen)
            if _all_hold(self.of_variants, row):
                left.append(candidate.variant)
                if self.alive is not None:
                    self.alive.update(candidate.rows)
        return tuple(left)

    def _mark(self, groups: tuple[_Group, ...]) -> None:
        met = self.waiting.intersection(groups)
        if met and self.alive is not None:
            self.waiting -= met
            self.alive.update(group.variants[0][0] for group in met)


def _parts(choice: Choice) -> set[str]:
    return {AXES[name].part for name in choice.axes}


def _groups(number: int, choice: Choice) -> tuple[_Group, ...]:
    """Rows grouped by their problem axes, in order of first appearance."""
    grouped: dict[tuple[tuple[str, Value], ...], list[tuple[RowId, Row]]] = {}
    for index, row in enumerate(choice.rows):
        variant = {name: value for name, value in row.items() if AXES[name].part == "variant"}
        problem = tuple((name, value) for name, value in row.items() if name not in variant)
        grouped.setdefault(problem, []).append(((number, index), variant))
    return tuple(_Group(dict(problem), tuple(variants)) for problem, variants in grouped.items())


def _candidates(carriers: tuple[_Group, ...]) -> list[_Candidate]:
    candidates = []
    for rows in product(*(group.variants for group in carriers)):
        values = VARIANT_DEFAULTS.copy()
        for _, variant in rows:
            values.update(variant)
        seen = {name: comparable(name, value) for name, value in values.items()}
        candidates.append(_Candidate(seen, Variant(**values), tuple(identity for identity, _ in rows)))
    return candidates


def _all_hold(conditions: list[Evaluate], row: Row) -> bool:
    """In order, up to the first that does not: an earlier one may guard a later one's division."""
    for holds in conditions:  # noqa: SIM110  (a generator costs several times more, a million times)
        if not holds(row):
            return False
    return True


def _merged(row: Row, groups: Iterable[_Group]) -> Row:
    for group in groups:
        row.update(group.problem)
    return row


def layer_reasons(sweep: Sweep, row: Mapping[str, Value]) -> str | None:
    """Why no layer can be built from a sweep with this row, or None where one can."""
    choices = [choice for choice in sweep.choices if "layer" in _parts(choice)]
    kept = [[each for each in choice.rows if not row.keys() & choice.axes or each == row] for choice in choices]
    reason = None
    for rows in product(*kept):
        written = {name: value for each in rows for name, value in each.items()}
        layer = shape.effective(written)
        if not isinstance(layer, str):
            return None
        reason = layer
    return f"for example, {reason}" if reason else None
