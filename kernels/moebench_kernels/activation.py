"""Activations of an expert: the maths, as torch, as Triton functions, and their backward kernel.

With the pre-activation z [R, 2F] = (gate, up) for gated kinds, z [R, F] otherwise:

    swiglu          silu(gate) * up      silu(z) = z * sigmoid(z)
    geglu           gelu(gate) * up      gelu(z) = z * Phi(z), Phi the normal distribution function (erf, not tanh)
    clamped_swiglu  g * sigmoid(1.702 g) * (clamp(up, -7, 7) + 1), g = min(gate, 7)       (gpt-oss)
    relu, gelu, silu

so every gated kind is s(gate) * u(up). Backward, from da = dL/da, recomputes a = act(z):
    gated: d_gate = da * u(up) * s'(gate), d_up = da * s(gate) * u'(up);   ungated: dz = da * s'(z)
with s' and u' zero where the clamp cuts (and one-sided at its edge, as torch has it).

The layer's backward has da before the router weight w of the row is applied; then the kernel uses w * da,
and also returns w * a (for dW_down) and <da, a> = d_weight, which spares keeping the experts' answers
(the identity is SonicMoE's, arXiv 2512.14080).

Shapes: z [R, mF] with m = 2 or 1, a and da [R, F], weights and d_weights [T, K].
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moebench_kernels.plan import Plan
from moebench_kernels.runtime import cdiv, jit, next_power_of_2, on_device, tl

GATED = {"swiglu": "silu", "geglu": "gelu", "clamped_swiglu": "clamped"}  # activation -> KIND of the kernels
ACTIVATIONS = ("swiglu", "geglu", "clamped_swiglu", "relu", "gelu", "silu")
LIMIT, SHARPNESS = 7.0, 1.702  # gpt-oss's; written out in the kernels, which may not read Python globals


def input_maps(activation: str) -> int:
    """m: 2 where there is a gate and an up map, else 1."""
    return 2 if activation in GATED else 1


def activate_torch(z: Tensor, activation: str) -> Tensor:
    """Reference: [R, mF] -> [R, F], in z's dtype."""
    if activation == "clamped_swiglu":
        gate, up = z.chunk(2, dim=-1)
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return gate * torch.sigmoid(SHARPNESS * gate) * (up + 1)
    act = {"relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu}[GATED.get(activation, activation)]
    if activation not in GATED:
        return act(z)
    gate, up = z.chunk(2, dim=-1)
    return act(gate) * up


@dataclass(frozen=True)
class ActivationConfig:
    """Rows and columns of a tile; a program goes over all columns of its rows."""

    block_r: int
    block_f: int
    num_warps: int = 4


def activation_config(F: int) -> ActivationConfig:
    """1024 elements at a time: gate, up, da and three results stay within 8 registers each."""
    block_f = min(256, next_power_of_2(F))
    return ActivationConfig(block_r=1024 // block_f, block_f=block_f)


@jit
def act(z, KIND: tl.constexpr):
    """s(z) of a float32 tile: silu, gelu, relu, or gpt-oss's clamped form of silu."""
    if KIND == "silu":
        y = z * tl.sigmoid(z)
    elif KIND == "clamped":
        gate = tl.where(z > 7.0, 7.0, z)  # unlike minimum, keeps a NaN, as torch does
        y = gate * tl.sigmoid(1.702 * gate)
    elif KIND == "gelu":
        y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        y = tl.where(z < 0.0, 0.0, z)
    return y


@jit
def act_slope(z, KIND: tl.constexpr):
    """Derivative of `act`; relu's is 0 at 0, as torch has it."""
    if KIND == "silu":
        s = tl.sigmoid(z)
        y = s * (1.0 + z * (1.0 - s))
    elif KIND == "clamped":
        gate = tl.where(z > 7.0, 7.0, z)
        s = tl.sigmoid(1.702 * gate)
        y = tl.where(z <= 7.0, s * (1.0 + 1.702 * gate * (1.0 - s)), 0.0)
    elif KIND == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        y = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    else:
        y = tl.where(z > 0.0, 1.0, 0.0)
    return y


@jit
def up_factor(up, KIND: tl.constexpr):
    """u(up), which a gated kind multiplies s(gate) by."""
    if KIND == "clamped":
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
    return up


@jit
def up_slope(up, KIND: tl.constexpr):
    """u'(up), as a factor: 1 but where the clamp cuts."""
    return tl.where(tl.abs(up) <= 7.0, 1.0, 0.0) if KIND == "clamped" else 1.0


@jit
def _activation_backward_kernel(
    z_ptr, da_ptr, weights_ptr, row2assignment_ptr, dz_ptr, wa_ptr, d_weights_ptr, n_rows, F,
    KIND: tl.constexpr, IS_GATED: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    assignment = tl.load(row2assignment_ptr + row, mask=row < n_rows, other=-1)
    kept = assignment >= 0
    width = F
    if IS_GATED:
        width = 2 * F
    if WEIGHTED:
        weight = tl.load(weights_ptr + assignment, mask=kept, other=0.0)
        d_weight = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, F, BLOCK_F):
        col = first + tl.arange(0, BLOCK_F)
        inside = kept[:, None] & (col < F)[None, :]
        exists = (row < n_rows)[:, None] & (col < F)[None, :]
        at_a = row[:, None] * F + col[None, :]
        at_z = row[:, None] * width + col[None, :]
        z = tl.load(z_ptr + at_z, mask=inside, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + at_a, mask=inside, other=0.0).to(tl.float32)
        a = act(z, KIND)
        slope = act_slope(z, KIND)
        if IS_GATED:
            up = tl.load(z_ptr + at_z + F, mask=inside, other=0.0).to(tl.float32)
            d_up = a * up_slope(up, KIND)
            up = up_factor(up, KIND)
            a = a * up
            slope = slope * up
        if WEIGHTED:
            d_weight += tl.sum(da * a, axis=1)
            tl.store(wa_ptr + at_a, (weight[:, None] * a).to(wa_ptr.dtype.element_ty), mask=exists)
            da = da * weight[:, None]
        tl.store(dz_ptr + at_z, (da * slope).to(dz_ptr.dtype.element_ty), mask=exists)
        if IS_GATED:
            tl.store(dz_ptr + at_z + F, (da * d_up).to(dz_ptr.dtype.element_ty), mask=exists)
    if WEIGHTED:
        tl.store(d_weights_ptr + assignment, d_weight, mask=kept)


def launch_activation_backward(
    z: Tensor, da: Tensor, activation: str, plan: Plan, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dz [R, mF], and with weights also w*a [R, F] and d_weights [T, K]; unchecked."""
    F = da.shape[1]
    dz = torch.empty_like(z)
    wa = None if weights is None else torch.empty_like(da)
    d_weights = None if weights is None else torch.zeros_like(weights)
    config = activation_config(F)
    if plan.n_rows:
        with on_device(z):
            _activation_backward_kernel[(cdiv(plan.n_rows, config.block_r),)](
                z, da, weights, plan.row2assignment, dz, wa, d_weights, plan.n_rows, F,
                KIND=GATED.get(activation, activation), IS_GATED=activation in GATED, WEIGHTED=weights is not None,
                BLOCK_R=config.block_r, BLOCK_F=config.block_f, num_warps=config.num_warps,
            )  # fmt: skip
    return dz, wa, d_weights
