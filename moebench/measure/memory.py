"""Peak memory of one pass above what was resident before it, and how much memory is left.

CPU (Linux): the kernel's own high-water mark of resident pages (VmHWM), reset through
/proc/self/clear_refs (proc(5)). What counts is touched pages of the whole process: an untouched
allocation does not, a workspace that a library keeps between calls does not after a warm-up, a
temporary that comes and goes during the pass does. CUDA: the caching allocator's high-water mark
of allocated bytes (not of reserved ones).
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import psutil

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")

# Garbage that is older is resident before the pass and after it. To look for it takes 0.2 s where a compiler is loaded.
YOUNG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
GLIBC_MAX_MMAP_THRESHOLD = 32 << 20
NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


def peak_memory(call: Callable[[], object], device_kind: str, *, proc: Path = PROC) -> tuple[int | None, str | None]:
    """Bytes that a solo pass needs above what is resident: (bytes, None), or (None, the reason).

    The call is warmed up and runs once, alone. On CPU see `resolution_bytes`; pages the kernel
    moves to swap meanwhile are not seen.
    """
    return _cuda_peak(call) if device_kind == "cuda" else _cpu_peak(call, proc / "self")


def _cuda_peak(call: Callable[[], object]) -> tuple[int | None, str | None]:
    import torch

    gc.collect(YOUNG)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, None


def _cpu_peak(call: Callable[[], object], process: Path) -> tuple[int | None, str | None]:
    gc.collect(YOUNG)
    _give_back_free_heap()
    try:
        (process / "clear_refs").write_text("5")
        before = _status_bytes(process, "VmRSS")
    except (OSError, ValueError) as error:
        return None, f"the peak of resident memory cannot be reset here ({error})"
    call()
    return max(0, _status_bytes(process, "VmHWM") - before), None


def _status_bytes(process: Path, key: str) -> int:
    for line in (process / "status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {key} in {process / 'status'}")


def _give_back_free_heap() -> None:
    # Freed blocks that malloc keeps are resident: a pass that reuses them would look smaller than it
    # is. malloc_trim gives back every whole free page, also in the middle of the heap (glibc >= 2.8).
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resolution_bytes(device_kind: str) -> int:
    """Below this a CPU peak is noise: the kernel counts pages per core in batches of max(32, 2 * cores)."""
    if device_kind == "cuda":
        return 512  # the caching allocator's granule
    cores = os.cpu_count() or 1
    return os.sysconf("SC_PAGE_SIZE") * max(32, 2 * cores) * cores


def pin_allocator() -> bool:
    """Fix malloc's thresholds for the rest of the process; True where that worked (glibc).

    glibc serves large blocks from fresh pages until the first one is freed, and from then on from
    kept ones (up to 32 MiB): the order in which arms ran would change their times. Here the state
    that a long-lived process settles in is set from the start. Call once, when a worker starts.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    done = mallopt(M_MMAP_THRESHOLD, GLIBC_MAX_MMAP_THRESHOLD)
    return bool(done and mallopt(M_TRIM_THRESHOLD, 2 * GLIBC_MAX_MMAP_THRESHOLD))


def available_bytes(device_kind: str, *, proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Bytes that can be allocated now without swapping or being killed: the machine's, or its container's."""
    if device_kind == "cuda":
        return _cuda_available()
    free = int(psutil.virtual_memory().available)
    headroom = cgroup_headroom(proc / "self" / "cgroup", cgroup)
    return free if headroom is None else max(0, min(free, headroom))


def _cuda_available() -> int:
    import torch

    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + cached


def cgroup_headroom(membership: Path, root: Path) -> int | None:
    """The least (limit - use) over this process's memory cgroup and its parents (v2 or v1); None: no limit."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    rooms: list[int] = []
    for _, controllers, path in lines:
        if controllers == "":
            rooms += _rooms(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            v1 = root / "memory"
            rooms += _rooms(v1, path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return min(rooms, default=None)


def _rooms(root: Path, path: str, limit: str, usage: str, cache: str) -> list[int]:
    # Inside a container the path may be the host's: what is not there is passed over, the root is always tried.
    folder = root / path.strip("/")
    folders = [folder, *folder.parents]
    rooms = [_room(each, limit, usage, cache) for each in folders[: folders.index(root) + 1]]
    return [room for room in rooms if room is not None]


def _room(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        allowed = (folder / limit).read_text().strip()
        if allowed == "max" or int(allowed) >= NO_LIMIT:
            return None
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return int(allowed) - used + int(stat.get(cache, 0))  # file cache is given back under pressure
