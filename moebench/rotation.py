"""Rotation: what the calls of an arm take turns over, so that none finds in the cache what the one before has read.

Four draws of inputs and routing always rotate. Where the weights they reach and their inputs together are small
beside the last-level cache, copies of the weights (and the provider's states for them) rotate too. Lives in the worker.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moebench.arm import Arm, tensors_in
from moebench.point import DRAWS
from moebench.work import variant_work
from moebench.yardsticks import Yardstick

COPIES_SHARE = 0.25  # of the memory that is left
MAX_COPIES = 8
COPIES = (1, 2, 4, MAX_COPIES)  # powers of two, so that draws and copies come round together


def take_turns(arm: Arm | Yardstick, cache: str, cold_bytes: float, free_bytes: float) -> float:
    """Set what an arm or a yardstick rotates over; the bytes that one rotation reads.

    Args:
        cache: what the suite asks for, "cold" or "hot".
        cold_bytes: from so many on it is cold.
        free_bytes: the memory that is left.
    """
    if isinstance(arm, Yardstick):
        return arm.rotate(cache == "cold")
    return stay_hot(arm) if cache == "hot" else rotate(arm, cold_bytes, COPIES_SHARE * free_bytes)


def stay_hot(arm: Arm) -> float:
    """Rotate over nothing: every call runs draw 0 on the layer's own weights. Returns the bytes that a call reads."""
    arm.rotation = 1
    return _rotating_bytes(arm, _active(arm), 1, 1)


def rotate(arm: Arm, cold_bytes: float, spare_bytes: float) -> float:
    """Rotate over as few copies of the weights as make `cold_bytes` of what rotates.

    None where `MAX_COPIES` are not enough, where they would take more than `spare_bytes`, or where the
    provider cannot be made ready again: then the draws alone rotate.

    Returns:
        Bytes of weights and inputs that one rotation reads at least once; what lies between stages, outputs and
        gradients are not counted.
    """
    active = _active(arm)
    sizes = {copies: _rotating_bytes(arm, active, copies, max(DRAWS, copies)) for copies in COPIES}
    copies = next((number for number, size in sizes.items() if size >= cold_bytes), 1)
    each = 2 * sum(value.nbytes for value in arm.weights.tensors().values())  # a state may be a copy, too
    if copies == 1 or (copies - 1) * each > spare_bytes or not arm.add_copies(copies):
        return sizes[1]
    arm.rotation = max(DRAWS, copies)
    return sizes[copies]


def _rotating_bytes(arm: Arm, active: list[Tensor], copies: int, rotation: int) -> float:
    """What `rotation` calls in a row read of `copies` copies of the weights, and of their inputs, each byte once."""
    problem = replace(arm.bench.problem, direction="forward")
    weights = 0.0
    for copy in range(min(copies, rotation)):
        reached = torch.stack([active[index % DRAWS] for index in range(copy, rotation, copies)]).any(0)
        work = variant_work(problem, arm.variant, active_experts=float(reached.sum()), kept=0.0)
        weights += work.weight_bytes
    given = [tensors_in(arm.scoped[draw]) for draw in range(min(rotation, DRAWS))]
    return weights + sum({value.data_ptr(): value.nbytes for values in given for value in values}.values())


def _active(arm: Arm) -> list[Tensor]:
    """bool [E] for each draw: the experts that keep a token."""
    return [draw.counts > 0 for draw in arm.bench.routed(arm.variant.capacity)]
