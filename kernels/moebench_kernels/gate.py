"""Gate: logits -> the K experts of each token, and their weights.

    score_first   choose by  c = s + bias     s: the scores of all E experts (gate_scores.py), softmax over all E
    topk_first    choose by  c = z + bias     s: the scores of the K chosen, softmax over those K alone
    groups        only the best `topk_groups` of `n_groups` equal groups of consecutive experts, by a group's
                  largest c, or by the sum of its two largest, may be chosen
    ids           = the K largest c, by falling c
    weights       = scale * s[ids]            renormalised: scale * s[ids] / (sum of s[ids] + 1e-20)

Equal c go to the lower id, equal groups to the lower group. Scores rise with z, so without a bias the choice
is made on z itself and only logits that are truly equal tie, however their scores round (two sigmoids of 1.0);
sums of two scores, and scores with a bias, are compared as float32 numbers.

Shapes: logits [T, E], bias [E], ids [T, K], weights [T, K]. Backward: gate_backward.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebench_kernels.build import Build, signature
from moebench_kernels.checks import (
    FLOATS,
    check_bool,
    check_choice,
    check_finite,
    check_int,
    check_launch,
    check_one_device,
    check_tensor,
)
from moebench_kernels.gate_backward import topk_gate_backward
from moebench_kernels.gate_scores import SCORINGS, TINY, bounded, bounded_torch, pointwise_score, scores_torch
from moebench_kernels.gate_select import choose, kept_groups, ordered, ordered_half
from moebench_kernels.runtime import cdiv, interpreting, jit, next_power_of_2, on_device, tl

ORDERS = ("score_first", "topk_first")
GROUP_SCORES = ("max", "top2_sum")
MAX_TOP_K = 64
MAX_EXPERTS = 4096


def topk_gate_torch(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    order: str = "score_first",
    bias: Tensor | None = None,
    renormalise: bool = False,
    n_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Reference of `topk_gate`; runs on any device. In float64 it computes and returns float64 weights."""
    _check_tensors(logits, bias, (*FLOATS, torch.float64), (*FLOATS, torch.float64), strided=True)
    _check_options(logits.shape[1], top_k, scoring, order, renormalise, n_groups, topk_groups, group_score, scale)
    z = bounded_torch(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    scores = scores_torch(z, scoring)
    score_first = order == "score_first"
    choice = (scores if score_first and bias is not None else z).detach()
    worth = scores.detach() if score_first else choice
    if bias is not None:
        shift = bounded_torch(bias.detach().to(z))
        choice, worth = bounded_torch(choice + shift), bounded_torch(worth + shift)
    if n_groups > 1:
        kept = _kept_groups_torch(choice if group_score == "max" else worth, n_groups, topk_groups, group_score)
        choice = choice.masked_fill(~kept, -torch.inf)
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :top_k]
    if score_first or scoring != "softmax":
        weights = scores.gather(1, ids)
        if renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    else:
        weights = torch.softmax(z.gather(1, ids), dim=-1)
    return ids.int().contiguous(), weights * scale


def _kept_groups_torch(choice: Tensor, n_groups: int, topk_groups: int, group_score: str) -> Tensor:
    """Which of [T, E] lie in a group that is kept."""
    T, E = choice.shape
    best = choice.reshape(T, n_groups, E // n_groups).sort(dim=-1, descending=True).values
    of_group = best[..., 0] if group_score == "max" else bounded_torch(best[..., :2].sum(dim=-1))
    groups = torch.sort(of_group, dim=-1, descending=True, stable=True).indices[:, :topk_groups]
    kept = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, groups, True)
    return kept.repeat_interleave(E // n_groups, dim=1)


@dataclass(frozen=True)
class GateConfig:
    """Tile of the gate: tokens a program takes; the row of E logits stays in registers."""

    block_t: int
    num_warps: int
    sort: bool


def gate_config(width: int, top_k: int, *, interpreted: bool = False) -> GateConfig:
    """By the width of the tile, which is E (each group) rounded up to a power of two, and K.

    Up to 1024 a row is one warp's: it finds the largest integer by one instruction and waits for nobody.
    Beyond, a row would not fit a warp's registers. Rows under 32 share a warp. By the compiler's instruction
    counts for sm_90, sorting is cheaper than picking from K = 32 on; it keeps more alive, so it takes more warps.
    Not measured on a GPU.
    The interpreter pays by the operation, not by the element, and most of all for sorts: many rows and none there.
    """
    if interpreted:
        return GateConfig(max(1, 16384 // width), 4, sort=False)
    sort = top_k > 32
    if width < 32:
        return GateConfig(512 // width, 4, sort)
    if width <= 128:
        return GateConfig(4, 4, sort)
    if width <= 1024 and not sort:
        return GateConfig(1, 1, sort)
    return GateConfig(1, min(max(1, width // (256 if sort else 512)), 16), sort)


@jit
def _topk_gate_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, T, scale, E: tl.constexpr,
    SCORING: tl.constexpr, SCORE_FIRST: tl.constexpr, OVER_CHOSEN: tl.constexpr, RENORMALISE: tl.constexpr,
    N_GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr, SORT: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    HALF: tl.constexpr = logits_ptr.dtype.element_ty != tl.float32 and not HAS_BIAS
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    place = tl.arange(0, BLOCK_G * BLOCK_S)
    # Groups lie BLOCK_S apart in the tile, so that a group can be reduced where it stands. E is a constant, as a
    # model has one: whole groups then load 128 bits at a time, and tiles without padding need no mask.
    GROUP_SIZE: tl.constexpr = E // N_GROUPS
    expert = place // BLOCK_S * GROUP_SIZE + place % BLOCK_S
    member = ((place // BLOCK_S < N_GROUPS) & (place % BLOCK_S < GROUP_SIZE))[None, :]
    row = logits_ptr + token[:, None] * E
    raw = tl.load(row + expert[None, :], mask=(token < T)[:, None] & member, other=0.0).to(tl.float32)
    z = bounded(raw)
    if SCORING == "softmax" and not OVER_CHOSEN:
        z_or_none = tl.where(member, z, float("-inf"))
        peak = tl.max(z_or_none, axis=1)
        shares = tl.exp(z_or_none - peak[:, None])
        total = tl.sum(shares, axis=1)
    choice = z
    worth = z
    if SCORE_FIRST and (HAS_BIAS or TOP2):
        worth = shares / total[:, None] if SCORING == "softmax" else pointwise_score(z, SCORING)
    if HAS_BIAS:
        shift = bounded(tl.load(bias_ptr + expert, mask=expert < E, other=0.0))[None, :]
        worth = bounded(worth + shift)
        choice = worth
    if N_GROUPS > 1:
        member = kept_groups(
            worth if TOP2 else choice, member, N_GROUPS, TOPK_GROUPS, TOP2, BLOCK_T, BLOCK_G, BLOCK_S
        )  # fmt: skip
    order = ordered_half(raw, logits_ptr.dtype.element_ty == tl.bfloat16) if HALF else ordered(choice)
    ids = choose(order, member, expert[None, :], HALF, SORT, TOP_K, BLOCK_T, BLOCK_K)
    # K values again from the cache cost less than K reductions to carry them along.
    pick = tl.arange(0, BLOCK_K)[None, :]
    exists = (token < T)[:, None] & (pick < TOP_K)
    z = bounded(tl.load(row + ids, mask=exists, other=0.0).to(tl.float32))
    if OVER_CHOSEN:
        z = tl.where(pick < TOP_K, z, float("-inf"))
        s = tl.exp(z - tl.max(z, axis=1)[:, None])
        s = s / tl.sum(s, axis=1)[:, None]
    elif SCORING == "softmax":
        s = tl.exp(z - peak[:, None]) / total[:, None]
    else:
        s = pointwise_score(z, SCORING)
    if RENORMALISE:
        s = s / (tl.sum(tl.where(pick < TOP_K, s, 0.0), axis=1) + 1e-20)[:, None]
    at = token[:, None] * TOP_K + pick
    tl.store(ids_ptr + at, ids, mask=exists)
    tl.store(weights_ptr + at, scale * s, mask=exists)


@torch.library.custom_op("moebench::topk_gate", mutates_args=())
def _topk_gate(
    logits: Tensor, bias: Tensor | None, top_k: int, scoring: str, order: str, renormalise: bool,
    n_groups: int, topk_groups: int, group_score: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_launch(logits=logits, **({} if bias is None else {"bias": bias}))
    T, E = logits.shape
    ids = torch.empty(T, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(T, top_k, dtype=torch.float32, device=logits.device)
    if T:
        over_chosen = _over_chosen(bias, scoring, order, renormalise, n_groups, group_score)
        constants = _constants(
            E, top_k, scoring, order == "score_first", over_chosen, renormalise, n_groups, topk_groups,
            group_score == "top2_sum", interpreted=interpreting(),
        )  # fmt: skip
        with on_device(logits):
            _topk_gate_kernel[(cdiv(T, constants["BLOCK_T"]),)](
                logits, bias, ids, weights, T, scale, **constants
            )  # fmt: skip
    return ids, weights


@_topk_gate.register_fake
def _(logits: Tensor, bias: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, bias, _, scoring, order, renormalise, n_groups, _, group_score, scale = inputs
    over_chosen = _over_chosen(bias, scoring, order, renormalise, n_groups, group_score)
    ctx.save_for_backward(logits, output[0])
    ctx.options = scoring, over_chosen, renormalise, scale


def _backward(ctx: Any, _: Any, d_weights: Tensor) -> tuple[Tensor | None, ...]:
    return topk_gate_backward(*ctx.saved_tensors, d_weights, *ctx.options), *(None,) * 9


_topk_gate.register_autograd(_backward, setup_context=_setup_context)


def _over_chosen(
    bias: Tensor | None, scoring: str, order: str, renormalise: bool, n_groups: int, group_score: str
) -> bool:
    """Whether the weights are a softmax over the chosen alone, which needs no sum over all E.

    So they are, but for the guard of 1e-20, also when a softmax is renormalised and the largest logit
    is sure to be among the chosen: its share is at least 1 / E.
    """
    has_largest = bias is None and (n_groups == 1 or group_score == "max")
    return scoring == "softmax" and (order == "topk_first" or (renormalise and has_largest))


def _constants(
    E: int, top_k: int, scoring: str, score_first: bool, over_chosen: bool, renormalise: bool,
    n_groups: int, topk_groups: int, top2: bool, *, interpreted: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The kernel's constants and num_warps."""
    block_g, block_s = next_power_of_2(n_groups), next_power_of_2(E // n_groups)
    config = gate_config(block_g * block_s, top_k, interpreted=interpreted)
    return {
        "E": E, "SCORING": scoring, "SCORE_FIRST": score_first, "OVER_CHOSEN": over_chosen,
        "RENORMALISE": renormalise and not over_chosen,
        "N_GROUPS": n_groups, "TOPK_GROUPS": topk_groups, "TOP2": top2 and n_groups > 1, "SORT": config.sort,
        "TOP_K": top_k, "BLOCK_T": config.block_t, "BLOCK_G": block_g, "BLOCK_S": block_s,
        "BLOCK_K": next_power_of_2(top_k), "num_warps": config.num_warps,
    }  # fmt: skip


def topk_gate(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    order: str = "score_first",
    bias: Tensor | None = None,
    renormalise: bool = False,
    n_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose K experts a token. Differentiable in `logits`; the bias only chooses and gets no gradient.

    Args:
        logits: [T, E], float32, float16 or bfloat16; computed in float32. E <= 4096, any number.
        top_k: K, 1 <= K <= min(topk_groups * E / n_groups, 64).
        scoring: "softmax", "sigmoid" or "sqrt_softplus".
        order: "score_first", choose by the scores of all experts, or "topk_first", choose by the logits and score
            the K chosen (which differs only for softmax, and in what the bias is added to).
        bias: float32 [E], added to what is chosen by, never to the weights.
        renormalise: divide the K weights by their sum + 1e-20 (no effect on softmax with "topk_first").
        n_groups: equal groups of consecutive experts; must divide E.
        topk_groups: how many of them may be chosen from, at most n_groups.
        group_score: a group's "max" or "top2_sum" (needs two experts a group) of what is chosen by, bias included.
        scale: factor on the weights after that.

    Returns:
        ids int32 [T, K], distinct in a row, by falling selection score, ties to the lower id; weights float32 [T, K].
        NaN and -inf count as the lowest finite float32, +inf as the highest, in logits and bias, so ids are
        distinct and weights finite for any row. Such a logit gets no gradient.

    Raises:
        TypeError, ValueError: before any launch.

    Source: Shazeer 2017, arXiv 1701.06538, eq. 3-5 without noise; Mixtral, arXiv 2401.04088, section 2.1
        ("topk_first"); DeepSeek-V2, arXiv 2405.04434, section 2.1.2 (groups, "max"); DeepSeek-V3, arXiv 2412.19437,
        eq. 12-16 (sigmoid, bias) with "top2_sum" as in its released code; sqrt_softplus: DeepSeek-V4's configuration.
    """
    _check_tensors(logits, bias, FLOATS, (torch.float32,))
    _check_options(logits.shape[1], top_k, scoring, order, renormalise, n_groups, topk_groups, group_score, scale)
    bias = None if bias is None else bias.detach()
    return _topk_gate(
        logits, bias, top_k, scoring, order, renormalise, n_groups, topk_groups, group_score, float(scale)
    )


def _check_tensors(
    logits: Tensor, bias: Tensor | None, floats: tuple[torch.dtype, ...], biases: tuple[torch.dtype, ...],
    *, strided: bool = False,
) -> None:  # fmt: skip
    check_tensor("logits", logits, ("T", "E"), floats, strided=strided)
    if bias is not None:
        check_tensor("bias", bias, (logits.shape[1],), biases, strided=strided)
        check_one_device(logits=logits, bias=bias)


def _check_options(
    E: int, top_k: int, scoring: str, order: str, renormalise: bool, n_groups: int, topk_groups: int,
    group_score: str, scale: float,
) -> None:  # fmt: skip
    check_choice("scoring", scoring, SCORINGS)
    check_choice("order", order, ORDERS)
    check_choice("group_score", group_score, GROUP_SCORES)
    check_bool("renormalise", renormalise)
    check_finite("scale", scale)
    for name, value in (("top_k", top_k), ("n_groups", n_groups), ("topk_groups", topk_groups)):
        check_int(name, value)
    if E > MAX_EXPERTS:
        raise ValueError(f"logits has {E} experts; at most {MAX_EXPERTS} are supported")
    if n_groups < 1 or E % n_groups:
        raise ValueError(f"n_groups is {n_groups}; it must divide the {E} experts")
    if not 1 <= topk_groups <= n_groups:
        raise ValueError(f"topk_groups is {topk_groups}; it must be between 1 and n_groups = {n_groups}")
    if group_score == "top2_sum" and n_groups > 1 and 2 * n_groups > E:
        raise ValueError(f"group_score 'top2_sum' needs two experts a group; here {E} experts make {n_groups} groups")
    most = min(topk_groups * (E // n_groups), MAX_TOP_K)
    if not 1 <= top_k <= most:
        limit = f"min(E, {MAX_TOP_K})" if n_groups == 1 else f"min(topk_groups * E / n_groups, {MAX_TOP_K})"
        raise ValueError(f"top_k is {top_k}; it must be between 1 and {limit} = {most}")


def _build(dtype: str, E: int, top_k: int, scoring: str = "softmax", *, bias: bool = False, **more: Any) -> Build:
    options = {"score_first": True, "over_chosen": False, "renormalise": False, "n_groups": 1, "topk_groups": 1}
    constants = _constants(E, top_k, scoring, **options | {"top2": False} | more)
    num_warps = constants.pop("num_warps")
    if not bias:
        constants["bias_ptr"] = None
    types = signature(
        _topk_gate_kernel, dtype, constants, ids_ptr="*i32", weights_ptr="*fp32", scale="fp32",
        **{"bias_ptr": "*fp32"} if bias else {},
    )  # fmt: skip
    name = " ".join(["topk_gate", scoring, dtype, f"e{E}", f"k{top_k}", *["bias"] * bias, *map(str, more)])
    return Build(name, _topk_gate_kernel, types, constants, num_warps=num_warps, unaligned=("T",))


def builds() -> list[Build]:
    """The gates of published models, and the widest: every tile, scoring, key and dtype that ships."""
    groups = {"n_groups": 8, "topk_groups": 4, "top2": True, "renormalise": True}
    return [
        _build("bf16", 8, 2, score_first=False, over_chosen=True),
        _build("fp32", 8, 2, score_first=False, over_chosen=True),
        _build("fp32", 64, 8),
        _build("bf16", 128, 8, over_chosen=True),
        _build("fp16", 60, 4),
        _build("fp32", 160, 6, n_groups=8, topk_groups=3),
        _build("fp32", 256, 8, "sigmoid", bias=True, **groups),
        _build("fp32", 384, 6, "sqrt_softplus", bias=True, renormalise=True),
        _build("fp32", 512, 10, over_chosen=True),
        _build("fp32", 1024, 16, "sigmoid", bias=True, renormalise=True),
        _build("fp32", 256, 64),
        _build("fp32", 1024, 64, "sqrt_softplus", bias=True),
        _build("fp32", 4096, 16),
        _build("fp16", 4096, 64),
        _build("bf16", 4096, 64, bias=True, renormalise=True),
    ]
