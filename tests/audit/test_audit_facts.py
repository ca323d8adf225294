"""What the audit reads from real binaries, and what it makes of them."""

import pytest

from moebench.audit.readers import Unreadable, read_amd, read_nvidia

ALL = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")


def faults(row):
    return " | ".join(row["faults"])


def test_every_target_has_its_own_matrix_instructions(rows):
    found = {target: rows["gemm bf16", target]["tensor_instructions"].split()[0] for target in ALL}
    assert found["sm_80"].startswith("HMMA.16816.F32.BF16")
    assert found["sm_90"] == "HGMMA.64x128x16.F32.BF16"
    assert found["sm_100"] == "UTCHMMA"
    assert found["gfx942"].startswith("v_mfma_f32_")
    assert found["gfx950"].startswith("v_mfma_f32_")
    assert found["gfx950"] != found["gfx942"], "CDNA4's are twice as deep"


def test_instructions_are_counted_by_family(rows):
    def families(target):
        return {name for name in ("mma", "wgmma", "tcgen05", "mfma") if rows["gemm bf16", target][name]}

    assert {target: families(target) for target in ALL} == {
        "sm_80": {"mma"}, "sm_90": {"wgmma"}, "sm_100": {"tcgen05"}, "gfx942": {"mfma"}, "gfx950": {"mfma"},
    }  # fmt: skip
    # 128 x 128 x 64 by four warp groups' instructions of 64 x 128 x 16: two groups, one half each.
    assert rows["gemm bf16", "sm_90"]["wgmma"] == 4


def test_fp8_is_seen_as_such(rows):
    assert rows["gemm fp8", "sm_90"]["tensor_instructions"].startswith("QGMMA.64x128x32.F32.E4M3.E4M3")


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_descriptors_become_tma(rows, target):
    row = rows["tma bf16", target]
    assert row["verdict"] == "ok"
    assert row["tma_loads"] > 0
    assert row["tma_stores"] > 0
    assert rows["gemm bf16", target]["tma_loads"] == rows["gemm bf16", target]["tma_stores"] == 0
    assert rows["gemm bf16", target]["async_copies"] > 0, "the other way to load ahead"


def test_alignment_decides_how_wide_loads_are(rows):
    for target in ("sm_90", "gfx942"):
        wide, narrow = rows["copy wide", target], rows["copy narrow", target]
        assert wide["loads"] == wide["wide_loads"] > 0
        assert narrow["wide_loads"] == 0
        assert narrow["loads"] == 4 * wide["loads"], "a float each"


def test_a_good_kernel_is_ok_and_complete(rows):
    for target in ALL:
        row = rows["gemm bf16", target]
        assert (row["verdict"], row["faults"]) == ("ok", [])
        assert 32 <= row["registers"] <= row["register_limit"]
        assert row["spill_bytes"] == 0
        assert 0 < row["shared_bytes"] <= row["shared_limit_bytes"]
        assert 0 < row["occupancy"] <= 1
        assert row["warps_per_sm"] == row["ctas_per_sm"] * 8
        assert (row["compile_ms"] is None) == row["cached"]
    # Operands in flight: 128 x 64 and 64 x 128 in bfloat16, in each of three stages.
    assert rows["gemm bf16", "sm_90"]["shared_bytes"] == 3 * 2 * 128 * 64 * 2


@pytest.mark.parametrize(("target", "cap", "warps"), [("sm_90", 255, 1), ("gfx942", 128, 16)])
def test_spills_are_a_fault(rows, target, cap, warps):
    row = rows["spills", target]
    assert row["verdict"] == "fault"
    assert row["spill_bytes"] > 0
    assert row["registers"] == row["register_limit"] == cap
    said = f"spills {row['spill_bytes']} bytes a thread at {cap} registers, the most that {warps} warp"
    assert faults(row).startswith(said)


@pytest.mark.parametrize(("target", "has"), [("sm_90", 227 * 1024), ("gfx942", 64 * 1024)])
def test_too_much_shared_memory_is_a_fault(rows, target, has):
    row = rows["too much shared", target]
    assert faults(row) == f"needs {row['shared_bytes']} bytes of shared memory; {target} has {has}"
    assert row["ctas_per_sm"] == row["warps_per_sm"] == 0
    assert row["occupancy_bound"] == "shared memory"


def test_what_is_expected_must_be_there_where_the_target_has_it(rows):
    assert faults(rows["copy expects", "sm_90"]) == ("has no wgmma (found: no tensor-core instruction) | uses no TMA")
    assert faults(rows["copy expects", "gfx950"]) == "has no mfma (found: no tensor-core instruction)"


@pytest.mark.parametrize(
    ("build", "said"),
    [
        ("uneven", "CompilationError: arange's range must be a power of 2"),
        ("calls python", "CompilationError: NameError(\"Cannot access global variable plain"),
        ("crash", "the compiler ended with signal SIGSEGV (Fatal Python error: Segmentation fault)"),
    ],
)  # fmt: skip
def test_what_does_not_compile_is_a_row_with_one_line(rows, build, said):
    row = rows[build, "sm_80"]
    assert row["verdict"] == "fault"
    (fault,) = row["faults"]
    assert fault.startswith(said)
    assert "\n" not in fault
    assert row["registers"] is row["occupancy"] is row["compile_ms"] is None


# Text that is not what a compiler writes must not pass for a small kernel.

LOG = "ptxas info    : Used 40 registers\n    8 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads\n"
SASS = "        /*0010*/               @!P0 HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24 ;\n"


@pytest.mark.parametrize(("log", "sass"), [("", SASS), ("Used 40 registers", SASS), (LOG, ""), (LOG, "garbage\n")])
def test_an_unknown_form_is_said(log, sass):
    with pytest.raises(Unreadable):
        read_nvidia(log, sass, shared_bytes=0, tensor_columns=0, warps=4)


def test_an_assembly_without_metadata_is_said():
    with pytest.raises(Unreadable, match=r"no \.vgpr_count"):
        read_amd("	v_add_f32 v0, v1, v2\n", shared_bytes=0, warps=4)


def test_functions_that_are_called_count():
    """A kernel that calls: ptxas reports each; registers are the most, memory the sum."""
    second = LOG.replace("Used 40", "Used 56").replace("0 bytes spill stores", "12 bytes spill stores")
    facts = read_nvidia(LOG + second, SASS, shared_bytes=1, tensor_columns=2, warps=4)
    assert (facts["registers"], facts["spill_bytes"], facts["stack_bytes"]) == (56, 20, 16)
    assert (facts["wgmma"], facts["mma"], facts["shared_bytes"], facts["tensor_columns"]) == (1, 0, 1, 2)
