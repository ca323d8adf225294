"""Selection inside the gate's kernel: the K places of a row that come first, on integers.

A float32 number c becomes an int32 in the order of c: the largest int32 of a warp is one instruction
since sm_80, the largest float or int64 five rounds of shuffles. Three ways to the places, ties to the lower id:

    packed  c of 16 bits leaves room in an int32 for the id, inverted: one reduction a pick finds both
    split   one reduction a pick finds the largest c, a second the lowest id that has it
    sort    a partial bitonic sort of keys that hold c and the id, for many picks

Shapes: tiles of [BLOCK_T tokens, places], where a place is an expert, or padding that is no `member`.
"""

from moebench_kernels.gate_scores import bounded
from moebench_kernels.runtime import jit, tl


@jit
def ordered(c):
    """int32 in the order of finite float32 numbers; -0.0 equals 0.0."""
    bits = tl.where(c == 0.0, 0.0, c).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def ordered_half(raw, IS_BF16: tl.constexpr):
    """int32 in the order of 16-bit numbers that were widened to float32, within 16 bits; NaN is -inf's equal."""
    number = tl.where(raw != raw, float("-inf"), tl.where(raw == 0.0, 0.0, raw))
    if IS_BF16:
        bits = number.to(tl.int32, bitcast=True) >> 16
    else:
        bits = number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return bits ^ ((bits >> 31) & 0x7FFF)


@jit
def kept_groups(
    choice, member, N_GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Which places of [BLOCK_T, BLOCK_G * BLOCK_S] lie in a group that is kept."""
    slot = tl.arange(0, BLOCK_S)[None, None, :]
    group = tl.arange(0, BLOCK_G)[None, :]
    c = tl.reshape(tl.where(member, choice, float("-inf")), [BLOCK_T, BLOCK_G, BLOCK_S])
    best = tl.max(c, axis=2)
    if TOP2:
        first = tl.min(tl.where(c == best[:, :, None], slot, BLOCK_S), axis=2)
        best = bounded(best + tl.max(tl.where(slot == first[:, :, None], float("-inf"), c), axis=2))
    key = tl.where(group < N_GROUPS, ordered(best), -2147483648)
    kept = tl.zeros([BLOCK_T, BLOCK_G], tl.int32)
    for _ in range(TOPK_GROUPS):
        top = tl.max(key, axis=1)
        which = tl.min(tl.where(key == top[:, None], group, BLOCK_G), axis=1)
        kept = tl.where(group == which[:, None], 1, kept)
        key = tl.where(group == which[:, None], -2147483648, key)
    wide = tl.broadcast_to(kept[:, :, None], [BLOCK_T, BLOCK_G, BLOCK_S])
    return member & (tl.reshape(wide, [BLOCK_T, BLOCK_G * BLOCK_S]) > 0)


@jit
def choose(
    order, member, expert, HALF: tl.constexpr, SORT: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The members that come first in `order` (int32), ties to the lower id: ids [BLOCK_T, BLOCK_K], K of them true.

    Taken experts and places without one hold a key below that of any number. HALF: `order` has 16 bits.
    """
    pick = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    if HALF:
        key = tl.where(member, (order << 16) | (65535 - expert), -2147483648)
    elif SORT:
        key = tl.where(member, (order.to(tl.int64) << 16) | (65535 - expert), -9223372036854775808)
    else:
        key = tl.where(member, order, -2147483648)
    if SORT:
        ids = 65535 - (tl.topk(key, BLOCK_K, dim=1) & 65535).to(tl.int32)
    else:
        for k in range(TOP_K):
            top = tl.max(key, axis=1)
            best = 65535 - (top & 65535) if HALF else tl.min(tl.where(key == top[:, None], expert, 65535), axis=1)
            key = tl.where(expert == best[:, None], -2147483648, key)
            ids = tl.where(pick == k, best[:, None], ids)
    return ids
