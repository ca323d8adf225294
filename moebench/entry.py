"""Entry: what has become of one arm or yardstick of a block so far. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from moebench.point import YARDSTICKS, Block, Point, Problem, Variant, digest
from moebench.providers import is_yardstick
from moebench.remote import Reply
from moebench.work import Work, point_work, variant_work


@dataclass
class Entry:
    """What has become of one arm so far.

    Attributes:
        point_id: unique in a run; a yardstick's is its block's own, since every block has the same ones.
        status: set once it is out of the race, with its reason.
        facts, verdict, warmth: replies of the worker to arm, check and warm.
        state: how the machine was while the block was sampled; of a GPU after this arm's own bursts.
        spent_s: sampling time so far.
        looked_at: how many samples there were when it was last asked whether they are enough.
    """

    index: int
    point: Point
    point_id: str
    role: str
    status: str | None = None
    reason: str | None = None
    facts: Reply = field(default_factory=dict)
    verdict: Reply | None = None
    warmth: Reply = field(default_factory=dict)
    peak: Reply = field(default_factory=dict)
    energy: Reply = field(default_factory=dict)
    state: Reply = field(default_factory=dict)
    samples_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    spent_s: float = 0.0
    looked_at: int = 0
    flags: list[str] = field(default_factory=list)

    @property
    def variant(self) -> Variant:
        """How it computes the problem."""
        return self.point.variant

    @property
    def live(self) -> bool:
        """Whether it still runs."""
        return self.status is None

    def flag(self, *flags: str) -> None:
        """Add flags, each once."""
        self.flags += [flag for flag in dict.fromkeys(flags) if flag not in self.flags]

    def fail(self, status: str, reason: str) -> None:
        """Take it out of the race."""
        self.status, self.reason = status, reason

    def discard_samples(self) -> None:
        """Begin sampling anew."""
        self.samples_ms, self.wall_ms, self.rounds = [], [], []
        self.spent_s, self.looked_at = 0.0, 0
        self.flags = [flag for flag in self.flags if flag.startswith("changed_")]  # the others are of those samples


def entries_of(block: Block, *, yardsticks: bool) -> list[Entry]:
    """The block's arms, and the yardsticks that go with every block (gemm once for each precision)."""
    arms = [
        Entry(index, point, point_id, "yardstick" if is_yardstick(point.variant.provider) else "arm")
        for index, (point, point_id) in enumerate(zip(block.points(), block.point_ids(), strict=True))
    ]
    added = [Point(block.problem, variant) for variant in yardstick_variants(block)] if yardsticks else []
    return arms + [
        Entry(index, point, digest([block.block_id, plain(point.variant)]), "yardstick")
        for index, point in enumerate(added, len(arms))
    ]


def yardstick_variants(block: Block) -> list[Variant]:
    """copy and read once, gemm for each precision, at the scope of the block's first variant."""
    first = block.variants[0]
    precisions = list(dict.fromkeys(variant.precision for variant in block.variants))
    return [
        Variant(name, precision, scope=first.scope)
        for name in YARDSTICKS
        for precision in (precisions if name == "gemm" else precisions[:1])
        if name != "gemm" or gemm_flops(block.problem, Variant(name, precision, scope=first.scope))
    ]


def gemm_flops(problem: Problem, variant: Variant) -> float:
    """What the GEMM yardstick is to take: the FLOPs of the dropless point."""
    return point_work(problem, variant).flops


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON-ready data."""
    return asdict(value)


def work_of(entry: Entry) -> Work | None:
    """The Work of an entry as routed; None for yardsticks that have none."""
    point, facts = entry.point, entry.facts
    if point.variant.provider in YARDSTICKS:
        return None
    return variant_work(point.problem, point.variant, active_experts=facts["active_experts"], kept=facts["kept"])
