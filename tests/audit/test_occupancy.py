"""Occupancy against what the vendors publish."""

import pytest

from moebench.audit.limits import LIMITS, occupancy, register_cap


def nvidia(registers, warps, shared=0, target="sm_80"):
    return occupancy(target, registers=registers, shared_bytes=shared, num_warps=warps)


def test_nvidias_own_example():
    """CUDA C++ Best Practices Guide, "Calculating Occupancy": 37 registers; CTAs of 128 and of 320 threads.

    The guide's device (7.0) has the register file and the warps of sm_80 and sm_90: 75 % with 12 CTAs, 63 % with 4.
    """
    assert nvidia(37, 4) == (12, 48, 0.75, "registers")
    found = nvidia(37, 10)
    assert (found.ctas, found.bound) == (4, "registers")
    assert round(found.share, 2) == 0.62


@pytest.mark.parametrize(
    ("waves", "fewest", "most"),
    [(8, 1, 64), (7, 65, 72), (6, 73, 80), (5, 81, 96), (4, 97, 128), (3, 129, 168), (2, 169, 256), (1, 257, 512)],
)
def test_llvms_table_for_gfx940(waves, fewest, most):
    """Waves a SIMD by vector registers: LLVM's unit test AMDGPU.TestVGPRLimitsPerOccupancy, gfx90a and gfx940."""
    for registers in (fewest, most):
        found = occupancy("gfx942", registers=registers, shared_bytes=0, num_warps=4)
        assert found.warps == 4 * waves


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "expected"),
    [
        (32, 4, 0, (16, 64, 1.0, "warps and registers")),
        (32, 1, 0, (32, 32, 0.5, "CTAs")),
        (255, 8, 0, (1, 8, 0.125, "registers")),
        (255, 16, 0, (0, 0, 0.0, "registers")),  # 512 threads of 256 do not fit 64 K
        (64, 4, 227 * 1024, (1, 4, 0.0625, "shared memory")),
        (64, 4, 227 * 1024 + 1, (0, 0, 0.0, "shared memory")),
        (64, 4, 113 * 1024, (2, 8, 0.125, "shared memory")),  # 228 KiB hold two, each with a KiB of the system's
        (64, 4, 113 * 1024 + 1, (1, 4, 0.0625, "shared memory")),
    ],
)
def test_each_bound_on_hopper(registers, warps, shared, expected):
    assert nvidia(registers, warps, shared, "sm_90") == expected


def test_tensor_memory_bounds_blackwell():
    found = occupancy("sm_100", registers=64, shared_bytes=1024, num_warps=4, tensor_columns=256)
    assert found == (2, 8, 0.125, "tensor memory")


def test_lds_comes_in_pieces():
    def ctas(target, bytes_):
        return occupancy(target, registers=64, shared_bytes=bytes_, num_warps=1).ctas

    assert ctas("gfx942", 8192) == 8
    assert ctas("gfx942", 8193) == 7
    assert ctas("gfx950", 160 * 1024) == 1
    assert ctas("gfx950", 80 * 1024) == 2
    assert ctas("gfx950", 80 * 1024 + 1) == 1


def test_the_most_registers_a_thread_can_have():
    assert [register_cap("sm_90", warps) for warps in (1, 4, 8, 16, 32)] == [255, 255, 255, 128, 64]
    assert [register_cap("gfx942", warps) for warps in (1, 4, 8, 16)] == [512, 512, 256, 128]
    assert LIMITS.keys() == {"sm_80", "sm_90", "sm_100", "gfx942", "gfx950"}
