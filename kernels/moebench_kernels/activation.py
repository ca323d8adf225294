"""Activations of an expert: the maths, as torch, as Triton functions, and their backward kernel.

With the pre-activation z [R, 2F] = (gate, up) for gated kinds, z [R, F] otherwise:

    swiglu          silu(gate) * up      silu(z) = z * sigmoid(z)
    geglu           gelu(gate) * up      gelu(z) = z * Phi(z), Phi the normal distribution function (erf, not tanh)
    clamped_swiglu  g * sigmoid(1.702 g) * (clamp(up, -7, 7) + 1), g = min(gate, 7)       (gpt-oss)
    relu, gelu, silu

so every gated kind is s(gate) * u(up). Backward, from da = dL/da, recomputes a = act(z):
    gated: d_gate = da * u(up) * s'(gate), d_up = da * s(gate) * u'(up);   ungated: dz = da * s'(z)
with s' and u' zero where the clamp cuts (and one-sided at its edge, as torch has it).

The layer has a backward of its own, fused with the down-projection's (activation_gemm_backward.py).

Shapes: z and dz [R, mF] with m = 2 or 1, a and da [R, F].
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moebench_kernels.build import Build, signature
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
    """2048 elements at a time: a 16-byte load of 16-bit values for each thread, also in AMD's wider warps."""
    block_f = min(256, next_power_of_2(F))
    return ActivationConfig(block_r=2048 // block_f, block_f=block_f)


@jit
def act(z, KIND: tl.constexpr):
    """s(z) of a float32 tile: silu, gelu, relu, or gpt-oss's clamped form of silu."""
    if KIND == "silu":
        y = z * tl.sigmoid(z)
    elif KIND == "clamped":
        gate = tl.minimum(z, 7.0, propagate_nan=tl.PropagateNan.ALL)  # as torch
        y = gate * tl.sigmoid(1.702 * gate)
    elif KIND == "gelu":
        y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        y = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return y


@jit
def act_slope(z, KIND: tl.constexpr):
    """Derivative of `act`; relu's is 0 at 0, as torch has it."""
    if KIND == "silu":
        s = tl.sigmoid(z)
        y = s * (1.0 + z * (1.0 - s))
    elif KIND == "clamped":
        gate = tl.minimum(z, 7.0, propagate_nan=tl.PropagateNan.ALL)
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
        up = tl.clamp(up, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL) + 1.0
    return up


@jit
def up_slope(up, KIND: tl.constexpr):
    """u'(up), as a factor: 1 but where the clamp cuts."""
    return tl.where(tl.abs(up) <= 7.0, 1.0, 0.0) if KIND == "clamped" else 1.0


@jit
def _activation_backward_kernel(
    z_ptr, da_ptr, row2assignment_ptr, dz_ptr, n_rows, F,
    KIND: tl.constexpr, IS_GATED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    kept = tl.load(row2assignment_ptr + row, mask=row < n_rows, other=-1) >= 0
    width = F
    if IS_GATED:
        width = 2 * F
    for first in range(0, F, BLOCK_F):
        col = first + tl.arange(0, BLOCK_F)
        inside = kept[:, None] & (col < F)[None, :]
        exists = (row < n_rows)[:, None] & (col < F)[None, :]
        at_z = row[:, None] * width + col[None, :]
        z = tl.load(z_ptr + at_z, mask=inside, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + row[:, None] * F + col[None, :], mask=inside, other=0.0).to(tl.float32)
        slope = act_slope(z, KIND)
        if IS_GATED:
            up = tl.load(z_ptr + at_z + F, mask=inside, other=0.0).to(tl.float32)
            slope = slope * up_factor(up, KIND)
            d_up = da * act(z, KIND) * up_slope(up, KIND)
            tl.store(dz_ptr + at_z + F, d_up.to(dz_ptr.dtype.element_ty), mask=exists)
        tl.store(dz_ptr + at_z, (da * slope).to(dz_ptr.dtype.element_ty), mask=exists)


def launch_activation_backward(z: Tensor, da: Tensor, activation: str, plan: Plan) -> Tensor:
    """dz [R, mF] from z [R, mF] and da [R, F], zero for rows of no expert, which are not read; unchecked."""
    dz, c = torch.empty_like(z), activation_config(da.shape[1])
    if plan.n_rows:
        with on_device(z):
            _activation_backward_kernel[(cdiv(plan.n_rows, c.block_r),)](
                z, da, plan.row2assignment, dz, plan.n_rows, da.shape[1],
                KIND=GATED.get(activation, activation), IS_GATED=activation in GATED,
                BLOCK_R=c.block_r, BLOCK_F=c.block_f, num_warps=c.num_warps,
            )  # fmt: skip
    return dz


def builds() -> list[Build]:
    """The kernel at F = 1024: each dtype, and each activation in bfloat16."""
    c, found = activation_config(1024), []
    for dtype, kind in [("fp32", "swiglu"), ("fp16", "swiglu"), *(("bf16", kind) for kind in ACTIVATIONS)]:
        constants = {
            "KIND": GATED.get(kind, kind), "IS_GATED": kind in GATED, "BLOCK_R": c.block_r, "BLOCK_F": c.block_f,
        }  # fmt: skip
        types = signature(_activation_backward_kernel, dtype, constants, row2assignment_ptr="*i32")
        found.append(
            Build(
                f"activation_backward {kind} {dtype}", _activation_backward_kernel, types, constants,
                num_warps=c.num_warps, unaligned=("n_rows",),
            )
        )  # fmt: skip
    return found
