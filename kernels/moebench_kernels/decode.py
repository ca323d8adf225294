"""Decode: the routed part of an MoE layer for few tokens, where time is the reading of weights.

    y[t] = sum over kept k of weights[t, k] * (W_down[e] act(W_gate_up[e] x[t] + b_gate_up[e]) + b_down[e])
    with e = ids[t, k]

Each token meets K of E experts and a few tokens share one, so almost no weight is used often: the layer cannot be
faster than the bytes of the active experts over the bandwidth, and all that is no weight must stay small. Two forms:

    gemv      (decode_gemv)  a handful of tokens, few of which share experts: vectors, two launches
    swap_ab   (decode_gemm)  up to 128 tokens: an expert's weights meet all its tokens in one pass, four launches

Both give the same bits each time (no float atomics), wait for nothing on the host, and can be captured in a CUDA graph.
More than 128 tokens are taken 128 at a time: right, but `moe_layer` is meant for them.

Shapes: x [T, D], ids and weights [T, K], w_gate_up [E, mF, D], w_down [E, D, F], y [T, D].
"""

from functools import cache

import torch
from torch import Tensor

from moebench_kernels.activation import ACTIVATIONS, activate_torch, input_maps
from moebench_kernels.checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_launch,
    check_one_device,
    check_same_dtype,
    check_tensor,
)
from moebench_kernels.decode_gemm import MAX_ASSIGNMENTS, launch_swap_ab
from moebench_kernels.decode_gemv import launch_gemv

MAX_TOKENS = 128
FORMS = ("gemv", "swap_ab")


def decode_layer_torch(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, *, activation: str = "swiglu",
    b_gate_up: Tensor | None = None, b_down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Reference of `decode_layer`, one expert at a time; runs on any device, float64 included."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for e in range(w_down.shape[0]):
        token, k = (ids == e).nonzero(as_tuple=True)
        z = x[token].to(wide) @ w_gate_up[e].to(wide).mT
        z = z if b_gate_up is None else z + b_gate_up[e].to(wide)
        answer = activate_torch(z, activation).to(x.dtype).to(wide) @ w_down[e].to(wide).mT
        answer = answer if b_down is None else answer + b_down[e].to(wide)
        y.index_add_(0, token, answer * weights[token, k].to(wide)[:, None])
    return y.to(x.dtype)


def decode_form(T: int, K: int, E: int) -> str | None:
    """Which form T tokens take, K of E experts each: "gemv", "swap_ab", or None where decode is not meant for them.

    The vector form reads an expert's weights for each of its tokens. It spares two launches, and what it reads again
    should come from L2; so it takes up to 4 tokens, while uniform routing would have it read at most a quarter twice.

    Args:
        T, K, E: as in the shapes above.

    Returns:
        A name of FORMS, or None.
    """
    if T > MAX_TOKENS:
        return None
    active = E * (1 - (1 - min(K / E, 1.0)) ** T)
    return "gemv" if T <= 4 and 1.25 * active >= T * K else "swap_ab"


@cache
def _family(device: torch.device) -> str:
    """Whose tiles fit the device. Others than these have about 100 KB of shared memory, which sm_80's tiles fit."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx950" if "gfx950" in torch.cuda.get_device_properties(device).gcnArchName else "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


@torch.library.custom_op("moebench::decode_layer", mutates_args=())
def _decode_layer(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, b_gate_up: Tensor | None,
    b_down: Tensor | None, activation: str, form: str,
) -> Tensor:  # fmt: skip
    given = {"x": x, "ids": ids, "weights": weights, "w_gate_up": w_gate_up, "w_down": w_down}
    biases = {"b_gate_up": b_gate_up, "b_down": b_down}
    check_launch(**given, **{name: bias for name, bias in biases.items() if bias is not None})
    (T, K), E = ids.shape, w_down.shape[0]
    y = torch.empty_like(x)
    tokens = max(1, min(MAX_TOKENS, MAX_ASSIGNMENTS // K))
    chosen = form if form != "auto" else decode_form(T, K, E)
    launch = launch_gemv if chosen == "gemv" else launch_swap_ab
    for first in range(0, T, tokens):
        part = slice(first, first + tokens)
        launch(
            x[part], ids[part], weights[part], w_gate_up, w_down, b_gate_up, b_down, y[part], activation,
            _family(x.device),
        )  # fmt: skip
    return y


@_decode_layer.register_fake
def _(x, ids, weights, w_gate_up, w_down, b_gate_up, b_down, activation, form):
    return torch.empty_like(x)


def decode_layer(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, *, activation: str = "swiglu",
    b_gate_up: Tensor | None = None, b_down: Tensor | None = None, form: str | None = None,
) -> Tensor:  # fmt: skip
    """The experts of an MoE layer on given routing, for few tokens. Inference only.

    Args:
        x: [T, D], float32, float16 or bfloat16, contiguous. Meant for T <= 128, right for any, T = 0 included.
        ids: int32 or int64 [T, K], K <= 2048; outside 0..E-1 (say -1): dropped. Any strides.
        weights: float32 [T, K]. Any strides; those of dropped assignments are not read.
        w_gate_up: of x's dtype; [E, 2F, D], gate rows first, for the gated kinds; [E, F, D] for the others.
        w_down: [E, D, F], x's dtype.
        activation: "swiglu", "geglu", "clamped_swiglu", "relu", "gelu" (erf) or "silu".
        b_gate_up: [E, 2F] or [E, F], float32 or x's dtype, or None.
        b_down: [E, D], float32 or x's dtype, or None.
        form: "gemv" or "swap_ab"; None picks by `decode_form`.

    Returns:
        y [T, D] of x's dtype. Sums are float32; the activations are rounded to x's dtype in between, in "swap_ab" also
        the experts' answers, unless their sum was split. Zero for a token all of whose assignments were dropped.

    Raises:
        TypeError, ValueError: before any launch; also where a gradient is wanted.

    Source: Shazeer 2017, arXiv 1701.06538, eq. 1.
    """
    check_choice("activation", activation, ACTIVATIONS)
    if form is not None:
        check_choice("form", form, FORMS)
    check_tensor("x", x, ("T", "D"), FLOATS)
    T, D = x.shape
    check_tensor("ids", ids, (T, "K"), INTEGERS, strided=True)
    if ids.shape[1] > MAX_ASSIGNMENTS:
        raise ValueError(f"ids has {ids.shape[1]} experts a token; at most {MAX_ASSIGNMENTS} are supported")
    check_tensor("weights", weights, tuple(ids.shape), (torch.float32,), strided=True)
    m = input_maps(activation)
    check_tensor("w_gate_up", w_gate_up, ("E", "2F" if m == 2 else "F", D), FLOATS)
    E, F = w_gate_up.shape[0], w_gate_up.shape[1] // m
    if F * m != w_gate_up.shape[1]:
        raise ValueError(f"w_gate_up has {F * m + 1} rows an expert; {activation} needs an even number (gate, up)")
    check_tensor("w_down", w_down, (E, D, F), FLOATS)
    check_same_dtype(x=x, w_gate_up=w_gate_up, w_down=w_down)
    for name, bias, width in (("b_gate_up", b_gate_up, m * F), ("b_down", b_down, D)):
        if bias is not None:
            check_tensor(name, bias, (E, width), (torch.float32, x.dtype))
    tensors = (x, weights, w_gate_up, w_down, b_gate_up, b_down)
    check_one_device(
        x=x, ids=ids, weights=weights, w_gate_up=w_gate_up, w_down=w_down, b_gate_up=b_gate_up, b_down=b_down
    )
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError("decode_layer has no backward; call it under torch.no_grad(), or moe_layer for gradients")
    return _decode_layer(x, ids, weights, w_gate_up, w_down, b_gate_up, b_down, activation, form or "auto")
