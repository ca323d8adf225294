"""Capacity: how many assignments an expert takes, and which are dropped beyond it.

C = a rounding of CF K T / E slots an expert. Who gets them is the drop order: every assignment has a turn, and an
expert keeps those whose turn comes first. What finds no slot gets id -1 and weight 0: the token passes on its residual
path.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from moebench.point import DROP_ORDERS, DROPLESS, ROUNDINGS, Capacity

_SWAP_ROUNDS = 32  # of 4,096 tokens with K 8 of E 64 none has an expert twice after these
_MASK = 0xFFFFFFFF


def capacity_slots(capacity: Capacity, tokens: int, top_k: int, routed_experts: int) -> int | None:
    """C slots an expert; at least 1; None when dropless.

    Roundings of share = CF K T / E, computed exactly (1.1 is eleven tenths):

        ceil    ceil(share)                                      Switch, arXiv 2101.03961, in its top-k form
        gshard  floor(share); at CF 1, K 2 the 2N / (G E) of one local group, a share that is not to be exceeded
                                                                 GShard, arXiv 2006.16668 (which names no rounding)
        mesh    max(min(T, floor(share)), 4)                     Mesh TensorFlow, transformer/moe.py
        lingvo  as mesh without T, then up to a multiple of 4    Lingvo, core/gshard_layers.py
        v-moe   ceil(share), then up to a multiple of 4          V-MoE, vmoe/moe.py
        tutel   K floor(CF ceil(T / E)); CF 0: what is needed, so None; CF < 0: what is needed, at most the slots of
                |CF|, which say it all: what is needed drops nothing    Tutel, impls/fast_dispatch.py

    Mesh and Lingvo leave K out of their factor, here it is in: their top-2 with factor 2 is CF 1.

    Raises:
        ValueError: no such rounding, or a factor it does not take; the line names what it takes.
    """
    if capacity.rounding not in ROUNDINGS:
        raise ValueError(f"capacity rounding {capacity.rounding!r} is not one of {', '.join(ROUNDINGS)}")
    if capacity.factor == DROPLESS:
        return None
    factor = _exact(capacity)
    if capacity.rounding == "tutel":
        per_pick = math.floor(abs(factor) * -(-tokens // routed_experts))
        return max(1, top_k * per_pick) if factor else None
    share = factor * top_k * tokens / routed_experts
    slots = {
        "ceil": math.ceil(share),
        "gshard": math.floor(share),
        "mesh": max(min(tokens, math.floor(share)), 4),
        "lingvo": _fours(max(math.floor(share), 4)),
        "v-moe": _fours(math.ceil(share)),
    }[capacity.rounding]
    return max(1, slots)


def _exact(capacity: Capacity) -> Fraction:
    """The factor as the decimal number it was written as."""
    factor, tutel = capacity.factor, capacity.rounding == "tutel"
    finite = isinstance(factor, (int, float)) and math.isfinite(factor)
    if not finite or not (tutel or float(factor) > 0):
        allowed = "any finite number" if tutel else "a number above 0"
        raise ValueError(
            f"capacity factor {factor!r} with rounding {capacity.rounding!r}: it must be {allowed}, or {DROPLESS!r}"
        )
    return Fraction(str(factor))


def _fours(slots: int) -> int:
    return -(-slots // 4) * 4


def apply_capacity(
    ids: Tensor, weights: Tensor, slots: int | None, routed_experts: int, order: str = "position"
) -> tuple[Tensor, Tensor]:
    """Drop what is over capacity.

    Whose turn comes first, by `order`:

        position        by token, a token's picks in their order
        choice          all first choices, then all second ones (GShard; Mesh TensorFlow)
        probability     the larger weight; ties to the earlier token
        batch_priority  as choice, tokens sorted by their best weight (V-MoE, arXiv 2106.05974)
        reroute         as position; what overflows goes, with its weight, to random experts while there are some with
                        room (Hunyuan-Large, arXiv 2411.02265). A token gets an expert twice only where random swaps
                        find no other way: hardly ever unless K is close to E. Random but fixed: the same for the same
                        ids, on every device.

    Args:
        ids: int64 [T, K]; -1 where no expert is wanted, which takes no slot.
        weights: float [T, K], at least 0.
        slots: C, or None for dropless.

    Returns:
        ids with -1 and weights with 0 where dropped; the weights of what is kept are unchanged.

    Raises:
        ValueError: no such order.
    """
    if order not in DROP_ORDERS:
        raise ValueError(f"drop order {order!r} is not one of {', '.join(DROP_ORDERS)}")
    if slots is None:
        return ids, weights
    slots = min(slots, ids.numel())
    fits = position_in_expert(ids, routed_experts, _turns(weights, order)) < slots
    kept = ids.masked_fill(~fits, -1)
    if order == "reroute":
        kept = _reroute(kept, (ids >= 0) & ~fits, slots, routed_experts)
    return kept, weights.masked_fill(kept < 0, 0)


def position_in_expert(ids: Tensor, routed_experts: int, turns: Tensor | None = None) -> Tensor:
    """How many assignments to the same expert have their turn earlier: int64 [T, K]; of no meaning where the id is -1.

    Args:
        ids: int64 [T, K].
        turns: int64 [T * K], the flat assignments in the order of their turns; None: as they stand.
    """
    flat = ids.flatten()
    expert = torch.where(flat < 0, routed_experts, flat)
    order = torch.argsort(expert, stable=True) if turns is None else turns[torch.argsort(expert[turns], stable=True)]
    counts = torch.zeros(routed_experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    first = counts.cumsum(0) - counts
    position = torch.empty_like(flat)
    position[order] = torch.arange(flat.numel(), device=ids.device) - first[expert[order]]
    return position.view_as(ids)


def _turns(weights: Tensor, order: str) -> Tensor | None:
    """The flat assignments in the order of their turns; None: as they stand."""
    weights = weights.detach()
    if order == "probability":
        return torch.argsort(weights.flatten(), descending=True, stable=True)
    if order in ("choice", "batch_priority"):
        flat = torch.arange(weights.numel(), device=weights.device).view_as(weights)
        if order == "batch_priority":
            flat = flat[torch.argsort(weights.amax(dim=1), descending=True, stable=True)]
        return flat.T.flatten()
    return None


def drop_by_device(
    ids: Tensor, weights: Tensor, devices: int, routed_experts: int, factor: float = 1.0, exempt: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2's drop: each device keeps its largest weights up to ceil(factor K T / devices) assignments.

    Args:
        ids: int64 [T, K]; -1 where no expert is wanted.
        weights: float [T, K], the affinities.
        devices: equal blocks of consecutive experts.
        exempt: bool [T], tokens that are never dropped (`exempt_tokens`); they use up the budget first.

    Returns:
        as `apply_capacity`.

    Raises:
        ValueError: the experts do not divide among the devices, or the factor is not above 0.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.2.4 (factor 1).
    """
    if devices < 1 or routed_experts % devices:
        raise ValueError(f"{routed_experts} experts do not divide among {devices} devices")
    budget = math.ceil(_exact(Capacity(factor)) * ids.numel() / devices)
    spared = torch.zeros_like(ids, dtype=torch.bool) if exempt is None else exempt[:, None].expand_as(ids)
    turns = torch.argsort(weights.detach().flatten(), descending=True, stable=True)
    turns = turns[torch.argsort(spared.flatten()[turns].to(torch.int8), descending=True, stable=True)]
    device = ids.div(routed_experts // devices, rounding_mode="floor")  # of -1: -1
    kept = (ids >= 0) & (spared | (position_in_expert(device, devices, turns) < budget))
    return ids.masked_fill(~kept, -1), weights.masked_fill(~kept, 0)


def exempt_tokens(tokens: int, tokens_per_sequence: int, share: float = 0.1) -> Tensor:
    """bool [T]: all tokens of about this share of the sequences, evenly spaced (DeepSeek-V2: about 10 %)."""
    sequence = torch.arange(tokens) // tokens_per_sequence
    return ((sequence + 1) * share).floor() > (sequence * share).floor()


def _reroute(kept: Tensor, overflow: Tensor, slots: int, routed_experts: int) -> Tensor:
    """`kept` [T, K] with the overflowing assignments at experts with room; -1 stays where there is no room left."""
    asked = overflow.flatten().nonzero().flatten()
    counts = torch.bincount(kept[kept >= 0], minlength=routed_experts)
    room = (slots - counts).clamp(min=0).cumsum(0)
    free = int(room[-1])
    if not free or not asked.numel():
        return kept
    # More slots than are asked for, since a spare one can be swapped for one that its token already has.
    picked = torch.searchsorted(room, _spread(free, min(free, 2 * asked.numel() + routed_experts), room), right=True)
    offered = torch.cat([picked, picked.new_full((max(0, asked.numel() - picked.numel()),), -1)])
    return _untwin(kept, asked, offered[_shuffled(offered.numel(), 1, kept.device)])


def _spread(free: int, count: int, like: Tensor) -> Tensor:
    """`count` different numbers below `free`, rising: a random one from each of `count` equal cells."""
    bounds = torch.arange(count + 1, device=like.device) * free // count
    return bounds[:-1] + _scrambled(count, 0, like.device) % bounds.diff()


def _untwin(kept: Tensor, asked: Tensor, offered: Tensor) -> Tensor:
    """Give `asked` the first of the `offered` experts, then swap what would name one expert twice for a token.

    Args:
        kept: int64 [T, K], -1 at what is asked for.
        asked: int64 [M], flat positions in `kept`.
        offered: int64 [at least M], experts in random order; what is left over is spare.
    """
    half = offered.numel() // 2
    for turn in range(_SWAP_ROUNDS):
        twin = _twins(kept, asked, offered)
        if not twin.any():
            break
        mates = _shuffled(offered.numel(), turn + 2, kept.device)
        one, other = mates[:half], mates[half : 2 * half]
        met = twin[one] | twin[other]
        one, other = one[met], other[met]
        swapped = offered.clone()
        swapped[one], swapped[other] = offered[other], offered[one]
        after = _twins(kept, asked, swapped).int()
        # Swaps that are as bad are taken too: they carry the fault to where it can be mended.
        good = after[one] + after[other] <= twin[one].int() + twin[other].int()
        one, other = one[good], other[good]
        offered = offered.clone()
        offered[one], offered[other] = swapped[one], swapped[other]
    return _placed(kept, asked, offered)


def _placed(kept: Tensor, asked: Tensor, offered: Tensor) -> Tensor:
    return kept.flatten().scatter(0, asked, offered[: asked.numel()]).view_as(kept)


def _twins(kept: Tensor, asked: Tensor, offered: Tensor) -> Tensor:
    """bool, as `offered`: whether its token would have this expert twice; spare ones have no token."""
    mine = offered[: asked.numel()]
    rows = _placed(kept, asked, offered)[asked // kept.shape[1]]
    twin = ((rows == mine[:, None]).sum(dim=1) > 1) & (mine >= 0)
    return torch.cat([twin, twin.new_zeros(offered.numel() - mine.numel())])


def _shuffled(count: int, salt: int, device: torch.device) -> Tensor:
    """A permutation of `count` numbers without a pattern, the same on every device (torch's generators differ)."""
    return torch.argsort(_scrambled(count, salt, device), stable=True)


def _scrambled(count: int, salt: int, device: torch.device) -> Tensor:
    """`count` different numbers below 2^32 without a pattern: MurmurHash3's last step on a counter."""
    x = torch.arange(count, device=device) + salt * 0x9E3779B1 & _MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ x >> shift) * factor & _MASK
    return x ^ x >> 16
