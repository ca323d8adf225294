"""Facts from what a compiler wrote: ptxas's log, the disassembled cubin, the AMD assembly. Text in, numbers out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TypedDict


class Facts(TypedDict):
    """What one compiled kernel is made of.

    `registers` are 32-bit registers a thread (AMD: vector registers, the accumulation registers among them, counted
    again in `accumulators`; `scalars` a wave). `spill_bytes` a thread: stores and loads as ptxas counts them (AMD: the
    registers spilled, times 4). `stack_bytes` a thread, spills among them. `shared_bytes` a CTA. `tensor_columns` of
    tensor memory. Instructions are counted once where they stand in the binary, however often they run.
    """

    registers: int
    accumulators: int | None
    scalars: int | None
    spill_bytes: int
    spilled_scalars: int | None
    stack_bytes: int
    shared_bytes: int
    tensor_columns: int
    warps: int
    mma: int
    wgmma: int
    tcgen05: int
    mfma: int
    tensor_instructions: str
    tma_loads: int
    tma_stores: int
    async_copies: int
    loads: int
    wide_loads: int


class Unreadable(Exception):
    """The compiler's output is not of the form known here; the message says what was looked for."""


# Families of matrix instructions, by the start of their names.
NVIDIA_MATRIX = {
    "mma": re.compile(r"[HIDQBO]MMA\b"),  # a warp's
    "wgmma": re.compile(r"[HIQB]GMMA\b"),  # a warp group's: sm_90
    "tcgen05": re.compile(r"UTC[A-Z]*MMA\b"),  # through tensor memory: sm_100
}
AMD_MATRIX = re.compile(r"v_s?mfma|v_smfmac")
SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_a-z.]*)", re.MULTILINE)
AMD_LINE = re.compile(r"^\s+([a-z][a-z0-9_]+)\b", re.MULTILINE)
AMD_ASYNC = re.compile(r"^\s+(?:global_load_lds|buffer_load\w+.*\blds\b)", re.MULTILINE)
PTXAS_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def read_nvidia(log: str, sass: str, *, shared_bytes: int, tensor_columns: int, warps: int) -> Facts:
    """Facts of a cubin from `ptxas -v` and `cuobjdump --dump-sass` (or nvdisasm).

    Raises:
        Unreadable: no register count in the log, or no instruction in the disassembly.
    """
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    frames = [tuple(map(int, found)) for found in PTXAS_SPILLS.findall(log)]
    if not registers or not frames:
        raise Unreadable("ptxas's log holds no register count")
    found = Counter(SASS_LINE.findall(sass))
    if not found:
        raise Unreadable("the disassembly holds no instruction")
    loads = _these(found, r"LDG\b|LDGSTS\b")
    matrix = {family: _these(found, pattern) for family, pattern in NVIDIA_MATRIX.items()}
    return {
        "registers": max(registers),
        "accumulators": None,
        "scalars": None,
        "spill_bytes": sum(stores + reads for _, stores, reads in frames),
        "spilled_scalars": None,
        "stack_bytes": sum(stack for stack, _, _ in frames),
        "shared_bytes": shared_bytes,
        "tensor_columns": tensor_columns,
        "warps": warps,
        "mma": matrix["mma"].total(),
        "wgmma": matrix["wgmma"].total(),
        "tcgen05": matrix["tcgen05"].total(),
        "mfma": 0,
        "tensor_instructions": _listed(matrix.values()),
        "tma_loads": _these(found, r"UTMALDG\b").total(),
        "tma_stores": _these(found, r"UTMA(STG|REDG)\b").total(),
        "async_copies": _these(found, r"LDGSTS\b").total(),
        "loads": loads.total(),
        "wide_loads": sum(count for name, count in loads.items() if ".128" in name),
    }


def read_amd(assembly: str, *, shared_bytes: int, warps: int) -> Facts:
    """Facts of a kernel from its amdgcn assembly and the metadata at its end.

    Raises:
        Unreadable: the metadata lacks a count.
    """
    found = Counter(AMD_LINE.findall(assembly))
    loads = _these(found, r"(global|flat|buffer)_load_")
    matrix = _these(found, AMD_MATRIX)
    return {
        "registers": _metadata(assembly, "vgpr_count"),
        "accumulators": _metadata(assembly, "agpr_count"),
        "scalars": _metadata(assembly, "sgpr_count"),
        "spill_bytes": 4 * _metadata(assembly, "vgpr_spill_count"),
        "spilled_scalars": _metadata(assembly, "sgpr_spill_count"),
        "stack_bytes": _metadata(assembly, "private_segment_fixed_size"),
        "shared_bytes": max(shared_bytes, _metadata(assembly, "group_segment_fixed_size")),
        "tensor_columns": 0,
        "warps": warps,
        "mma": 0,
        "wgmma": 0,
        "tcgen05": 0,
        "mfma": matrix.total(),
        "tensor_instructions": _listed([matrix]),
        "tma_loads": 0,
        "tma_stores": 0,
        "async_copies": len(AMD_ASYNC.findall(assembly)),
        "loads": loads.total(),
        "wide_loads": sum(count for name, count in loads.items() if name.endswith("x4")),
    }


def _metadata(assembly: str, name: str) -> int:
    counts = re.findall(rf"^\s*(?:- )?\.{name}:\s+(\d+)", assembly, re.MULTILINE)
    if not counts:
        raise Unreadable(f"the assembly's metadata holds no .{name}")
    return max(map(int, counts))


def _these(found: Counter[str], pattern: str | re.Pattern[str]) -> Counter[str]:
    return Counter({name: count for name, count in found.items() if re.match(pattern, name)})


def _listed(families: Iterable[Counter[str]]) -> str:
    """Such as "HGMMA.64x128x16.F32.BF16 8": most frequent first."""
    every = sum(families, Counter())
    return ", ".join(f"{name} {count}" for name, count in every.most_common())
