"""Peak memory of a pass, and how much is left."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from moebench.measure import memory
from moebench.measure.memory import available_bytes, cgroup_headroom, peak_memory, pin_allocator

MIB = 1 << 20


RESETTABLE = os.access("/proc/self/clear_refs", os.W_OK)


def peak(call):
    if not RESETTABLE:
        pytest.skip("no /proc/self/clear_refs on this system")
    number, reason = peak_memory(call, "cpu")
    assert reason is None
    return number


def filled(mib):
    return torch.empty(mib * MIB // 4).fill_(1.0)


def test_64_mib_read_64():
    assert peak(lambda: filled(64)) == pytest.approx(64 * MIB, rel=0.05)


@pytest.mark.parametrize("mib", [4, 24])
def test_a_block_that_malloc_keeps_counts_again_in_the_next_pass(mib):
    filled(30)  # freeing it raises glibc's threshold: what follows comes from kept heap
    sizes = [peak(lambda: filled(mib)) for _ in range(3)]
    assert sizes == pytest.approx([mib * MIB] * 3, rel=0.05, abs=memory.resolution_bytes("cpu"))


def test_two_live_blocks_of_32_read_64():
    assert peak(lambda: (filled(32), filled(32))) == pytest.approx(64 * MIB, rel=0.05)


def test_64_freed_and_64_again_read_64_not_128():
    def twice():
        first = filled(64)
        del first
        filled(64)

    assert peak(twice) == pytest.approx(64 * MIB, rel=0.05)


def test_a_pass_in_place_reads_about_nothing():
    x = filled(64)
    x.mul_(2)
    assert peak(lambda: x.mul_(2)) < MIB


def test_memory_that_no_one_touches_is_not_resident():
    assert peak(lambda: torch.empty(64 * MIB)) < MIB


def test_an_earlier_peak_does_not_show():
    filled(96)
    assert peak(lambda: filled(16)) == pytest.approx(16 * MIB, rel=0.05)


def test_an_error_of_the_pass_is_the_callers():
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0, "cpu")


def test_where_the_peak_cannot_be_reset_the_reason_is_given_and_the_pass_not_run(tmp_path):
    ran = []
    number, reason = peak_memory(lambda: ran.append(1), "cpu", proc=tmp_path)
    assert number is None
    assert "cannot be reset" in reason
    assert ran == []


def test_a_kernel_without_the_high_water_mark_is_a_reason(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("Name:\tx\n")
    number, reason = peak_memory(lambda: None, "cpu", proc=tmp_path)
    assert number is None
    assert "no VmRSS" in reason


def test_cuda_reads_the_allocators_peak_above_what_was_allocated(monkeypatch):
    state = SimpleNamespace(now=1000, peak=5000, waits=0)
    fake = SimpleNamespace(
        synchronize=lambda: setattr(state, "waits", state.waits + 1),
        reset_peak_memory_stats=lambda: setattr(state, "peak", state.now),
        memory_allocated=lambda: state.now,
        max_memory_allocated=lambda: state.peak,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    assert peak_memory(lambda: setattr(state, "peak", max(state.peak, state.now + 300)), "cuda") == (300, None)
    assert state.waits == 2


IN_A_FRESH_PROCESS = """
import ctypes, sys
from moebench.measure.memory import pin_allocator
class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "arena ord smb hblks hblkhd usm fsm uord ford keep".split()]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
assert sys.argv[1] == "plain" or pin_allocator()
before = info().hblks
keep = bytearray(24 << 20)
print(info().hblks - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc")
@pytest.mark.parametrize(("how", "mapped"), [("plain", "1"), ("pinned", "0")])
def test_a_pinned_allocator_serves_a_first_large_block_as_it_will_serve_the_hundredth(how, mapped):
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, how], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == mapped


def test_pinning_says_when_there_is_nothing_to_pin(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace())
    assert pin_allocator() is False


def cgroup(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_cgroup_v2_limit_of_a_parent_counts_and_file_cache_is_free(tmp_path):
    (tmp_path / "membership").write_text("0::/pod/box\n")
    cgroup(tmp_path / "cg" / "pod", memory__max="1000\n", memory__current="700\n", memory__stat="inactive_file 100\n")
    cgroup(tmp_path / "cg" / "pod" / "box", memory__max="max\n", memory__current="10\n", memory__stat="\n")
    assert cgroup_headroom(tmp_path / "membership", tmp_path / "cg") == 400


def test_a_full_cgroup_leaves_nothing_rather_than_no_limit(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/\n")
    cgroup(tmp_path / "cg", memory__max="1000", memory__current="1000", memory__stat="")
    assert available_bytes("cpu", proc=tmp_path, cgroup=tmp_path / "cg") == 0


def test_a_cgroup_v1_limit_seen_from_inside_the_container(tmp_path):
    (tmp_path / "membership").write_text("5:cpu:/x\n4:memory,hugetlb:/host/path/not/here\n")
    files = {
        "memory__limit_in_bytes": "5000",
        "memory__usage_in_bytes": "1000",
        "memory__stat": "total_inactive_file 9\n",
    }
    cgroup(tmp_path / "cg" / "memory", **files)
    assert cgroup_headroom(tmp_path / "membership", tmp_path / "cg") == 4009


def test_no_limit_is_none(tmp_path):
    assert cgroup_headroom(tmp_path / "absent", tmp_path) is None
    (tmp_path / "membership").write_text("4:memory:/\n")
    cgroup(tmp_path / "memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="1", memory__stat="")
    assert cgroup_headroom(tmp_path / "membership", tmp_path) is None


def test_available_memory_of_this_machine_is_plausible():
    assert 100 * MIB < available_bytes("cpu") < 1 << 50
    assert memory.resolution_bytes("cpu") >= 32 * 4096


def test_a_gpus_cached_blocks_are_available(monkeypatch):
    fake = SimpleNamespace(mem_get_info=lambda: (1000, 9000), memory_reserved=lambda: 500, memory_allocated=lambda: 300)
    monkeypatch.setattr(torch, "cuda", fake)
    assert available_bytes("cuda") == 1200


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_real_gpu_peak():
    assert peak_memory(lambda: torch.empty(64 * MIB, dtype=torch.uint8, device="cuda"), "cuda") == (64 * MIB, None)
