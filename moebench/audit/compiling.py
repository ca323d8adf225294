"""One build compiled for one target, and the key of what went into it. Runs in the worker; triton comes in here only.

The compiler is started with an explicit target, so there need be no GPU. TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import tempfile
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebench.audit import readers
from moebench.audit.readers import Facts, read_amd, read_nvidia

if TYPE_CHECKING:
    from moebench_kernels.build import Build


def is_nvidia(target: str) -> bool:
    """Whether the target is NVIDIA's; all others are AMD's."""
    return target.startswith("sm_")


def compile_build(build: Build, target: str) -> tuple[Facts, float]:
    """Facts, and milliseconds of the compile. Raises whatever the compiler raises, and `readers.Unreadable`."""
    import triton

    # What ptxas says of registers and spills is printed, and only when it really ran: so never from Triton's cache.
    knobs = triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        begin = time.perf_counter()
        compiled = triton.compile(_source(build), target=_gpu_target(target), options=_options(build))
        compile_ms = (time.perf_counter() - begin) * 1e3
    return _facts(compiled, target, log.getvalue()), compile_ms


def _facts(compiled: Any, target: str, log: str) -> Facts:
    metadata = compiled.metadata
    if not is_nvidia(target):
        return read_amd(compiled.asm["amdgcn"], shared_bytes=metadata.shared, warps=metadata.num_warps)
    return read_nvidia(
        log,
        disassemble(compiled.asm["cubin"]),
        shared_bytes=metadata.shared,
        tensor_columns=getattr(metadata, "tmem_size", None) or 0,
        warps=metadata.num_warps,
    )


def warm_up(targets: Iterable[str]) -> None:
    """Compile next to nothing for one target a vendor, so that what only the first compile pays is paid.

    About half a second of each build, since every one is compiled in a fork of this process.
    """
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def copy(x_ptr, y_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, BLOCK)
        tl.store(y_ptr + at, tl.load(x_ptr + at))

    from moebench_kernels.build import Build

    build = Build("warm-up", copy, {"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 128})
    for target in {is_nvidia(target): target for target in targets}.values():
        with contextlib.suppress(Exception):  # if nothing compiles, each build will say so itself
            compile_build(build, target)


def disassemble(cubin: bytes) -> str:
    """SASS of a binary, by the disassembler that comes with triton."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def key_of(build: Build, target: str) -> str:
    """Hash of all that decides the facts: sources, types, constants, options, target, versions, and our readers."""
    what = [
        build.kernel.cache_key,  # its source and that of every function it calls
        [(name, str(kind)) for name, kind in build.signature.items()],
        sorted((name, _constant(value)) for name, value in build.constants.items()),
        sorted(_options(build).items()),
        sorted(build.unaligned),
        target,
        sorted(versions(is_nvidia(target)).items()),
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


@cache
def versions(nvidia: bool = True) -> dict[str, str]:
    """Of triton and the tools that take part, with the settings that change what they write."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars

    found = {"triton": triton.__version__, **get_cache_invalidating_env_vars()}
    own = Path(readers.__file__).read_bytes() + Path(__file__).read_bytes()  # how it is compiled and read
    found["audit"] = hashlib.sha256(own).hexdigest()[:16]
    if nvidia:
        tools = triton.knobs.nvidia
        named = {"ptxas": tools.ptxas, "ptxas_blackwell": getattr(tools, "ptxas_blackwell", None)}
        found |= {name: tool.version for name, tool in named.items() if tool is not None}
    return found


def _source(build: Build) -> Any:
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    types = {name: build.signature.get(name, "constexpr") for name in names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if types[name].startswith(("*", "i", "u")) and types[name] != "i1" and name not in build.unaligned
    }
    return ASTSource(build.kernel, types, dict(build.constants), aligned)


def _gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(target[3:]), 32) if is_nvidia(target) else GPUTarget("hip", target, 64)


def _options(build: Build) -> dict[str, int]:
    return {"num_warps": build.num_warps, "num_stages": build.num_stages}


def _constant(value: Any) -> str:
    return str(getattr(value, "cache_key", None) or repr(value))
