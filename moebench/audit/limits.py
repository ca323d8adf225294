"""What a target has for a kernel, and how many of it fit at once. No torch, no triton.

NVIDIA: CUDA C++ Programming Guide, "Compute Capabilities" (technical specifications); allocation units from the Nsight
Compute occupancy calculator. AMD: LLVM's AMDGPU usage guide (code object metadata, GRANULATED_LDS_SIZE and
GRANULATED_WORKITEM_VGPR_COUNT) and the CDNA3 and CDNA4 instruction set references.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

KIB = 1024


@dataclass(frozen=True)
class Limits:
    """One streaming multiprocessor (AMD: compute unit) and what a CTA (work-group) may take of it.

    Attributes:
        warp: threads of a warp (wave).
        warps, ctas: most at once.
        schedulers: parts that the register file and the warps are split into.
        registers: 32-bit registers of each part, counted for one lane of a warp.
        register_unit: a warp takes registers (for a lane) in multiples of this.
        thread_registers: most a thread may have.
        shared_bytes, shared_cta_bytes: of the multiprocessor, and the most one CTA may ask for.
        shared_unit: CTAs take shared memory in multiples of this.
        shared_reserved: bytes the system adds to each CTA.
        tensor_columns: columns of tensor memory; 0 where there is none.
        cta_threads: most threads of a CTA.
    """

    warp: int
    warps: int
    ctas: int
    registers: int
    register_unit: int
    thread_registers: int
    shared_bytes: int
    shared_cta_bytes: int
    shared_unit: int
    shared_reserved: int = 0
    tensor_columns: int = 0
    schedulers: int = 4
    cta_threads: int = 1024


def _nvidia(shared_kib: int, tensor_columns: int = 0) -> Limits:
    """64 K registers in four files of 512 a lane; one KiB of shared memory per CTA is the system's own."""
    return Limits(
        warp=32, warps=64, ctas=32, registers=512, register_unit=8, thread_registers=255,
        shared_bytes=shared_kib * KIB, shared_cta_bytes=(shared_kib - 1) * KIB, shared_unit=128,
        shared_reserved=KIB, tensor_columns=tensor_columns,
    )  # fmt: skip


def _amd(shared_kib: int, shared_unit: int) -> Limits:
    """512 vector registers a lane, architectural and accumulation together; 8 waves on each of 4 SIMDs."""
    return Limits(
        warp=64, warps=32, ctas=32, registers=512, register_unit=8, thread_registers=512,
        shared_bytes=shared_kib * KIB, shared_cta_bytes=shared_kib * KIB, shared_unit=shared_unit,
    )  # fmt: skip


LIMITS = {
    "sm_80": _nvidia(164),
    "sm_90": _nvidia(228),
    "sm_100": _nvidia(228, tensor_columns=512),
    "gfx942": _amd(64, 512),
    "gfx950": _amd(160, 1280),
}


def register_cap(target: str, warps: int) -> int:
    """Most registers a thread can have in a CTA of so many warps: the file of a scheduler is shared among its warps."""
    limits = LIMITS[target]
    share = limits.registers // max(1, -(-warps // limits.schedulers))
    return min(limits.thread_registers, share // limits.register_unit * limits.register_unit)


class Occupancy(NamedTuple):
    """How many CTAs and warps run at once on a multiprocessor, and what keeps it from more."""

    ctas: int
    warps: int
    share: float
    bound: str


def occupancy(target: str, *, registers: int, shared_bytes: int, num_warps: int, tensor_columns: int = 0) -> Occupancy:
    """The bound from registers a thread, shared memory, tensor memory and warps of a CTA; 0 CTAs if it cannot run."""
    limits = LIMITS[target]
    fits = {
        "warps": limits.warps // num_warps,
        "CTAs": limits.ctas,
        "registers": _warps_by_registers(limits, registers) // num_warps,
        "shared memory": _ctas_by_shared(limits, shared_bytes),
    }
    if tensor_columns:
        fits["tensor memory"] = limits.tensor_columns // tensor_columns
    ctas = min(fits.values())
    bound = " and ".join(name for name, count in fits.items() if count == ctas)
    return Occupancy(ctas, ctas * num_warps, ctas * num_warps / limits.warps, bound)


def _warps_by_registers(limits: Limits, registers: int) -> int:
    each = _up(max(registers, 1), limits.register_unit)
    return limits.schedulers * min(limits.registers // each, limits.warps // limits.schedulers)


def _ctas_by_shared(limits: Limits, shared_bytes: int) -> int:
    if shared_bytes > limits.shared_cta_bytes:
        return 0
    taken = _up(shared_bytes + limits.shared_reserved, limits.shared_unit)
    return limits.shared_bytes // taken if taken else limits.ctas


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
