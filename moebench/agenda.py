"""Agenda: what one run is to measure, block by block, and what of it a journal lacks. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from moebench.entry import Entry, entries_of
from moebench.journal import REPAIR, Journal, Keys
from moebench.point import Block
from moebench.record import Record
from moebench.suite import DeviceKind, Suite, shard
from moebench.work import held_bytes

WEIGHTS_SHARE = 0.6  # of what is available; a block whose precisions need more together is split by precision


@dataclass(frozen=True)
class Agenda:
    """The blocks of a run's share of its suite, in each replicate.

    Attributes:
        share: (i, n), the share.
        available_bytes: when the run began, so that resuming splits blocks alike.
        yardsticks: whether they stand in the blocks.
    """

    suite: Suite
    device_kind: DeviceKind
    share: tuple[int, int]
    available_bytes: int
    yardsticks: bool

    def blocks(self) -> Iterator[Block]:
        """The blocks of one replicate, in order."""
        blocks = shard(self.suite.blocks(self.device_kind), *self.share)
        return chain.from_iterable(split_for_memory(block, self.available_bytes) for block in blocks)

    def entries(self) -> Iterator[tuple[int, Block, Entry]]:
        """Everything there will be a row of: (replicate, block, entry)."""
        for replicate in range(self.suite.replicates):
            for block in self.blocks():
                for entry in entries_of(block, yardsticks=self.yardsticks):
                    yield replicate, block, entry

    def done(self, journal: Journal, run_id: str) -> Keys:
        """What the journal holds.

        Raises:
            ValueError: its lines are damaged, or not of this run and suite.
        """
        done = Keys((record.point_id, record.replicate) for record in _of_run(journal, run_id))
        if len(done):
            wanted = Keys((entry.point_id, replicate) for replicate, _, entry in self.entries())
            if not done <= wanted:
                every = ((record.point_id, record.replicate) for record in journal.lines())
                stranger = next(key for key in every if key not in wanted)
                raise ValueError(f"{journal.path}: point {stranger[0]} is not in the suite; {REPAIR}")
        return done

    def holds(self, done: Keys, block: Block, replicate: int) -> bool:
        """Whether a block is done."""
        if not len(done):
            return False
        entries = entries_of(block, yardsticks=self.yardsticks)
        return all((entry.point_id, replicate) in done for entry in entries)


def _of_run(journal: Journal, run_id: str) -> Iterator[Record]:
    for record in journal.lines():
        if record.run_id != run_id:
            raise ValueError(f"{journal.path}: point {record.point_id} is of another run, {record.run_id}; {REPAIR}")
        yield record


def split_for_memory(block: Block, available_bytes: int) -> list[Block]:
    """The block, or one for each of its precisions where all their weights at once would not fit."""
    precisions = list(dict.fromkeys(variant.precision for variant in block.variants))
    needed = sum(held_bytes(block.problem.layer, precision) for precision in precisions)
    if len(precisions) == 1 or needed <= WEIGHTS_SHARE * available_bytes:
        return [block]
    return [
        Block(block.problem, tuple(variant for variant in block.variants if variant.precision == precision))
        for precision in precisions
    ]
