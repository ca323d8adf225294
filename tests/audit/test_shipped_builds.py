"""The kernels that ship, one config a kernel and target: no spill, fits, the tensor cores it is meant for.

`make audit` looks at all configs.
"""

import ast
import importlib.util
import os
from pathlib import Path

import pytest

from moebench.audit.limits import LIMITS
from moebench.audit.rows import fault_lines
from moebench.audit.run import Request, audit

FOLDER = Path(next(iter(importlib.util.find_spec("moebench_kernels").submodule_search_locations)))


def look(files, cache):
    before = os.environ.get("MOEBENCH_CACHE")
    os.environ["MOEBENCH_CACHE"] = cache
    try:
        return audit(Request(files)).rows
    finally:
        os.environ.pop("MOEBENCH_CACHE") if before is None else os.environ.update(MOEBENCH_CACHE=before)


@pytest.fixture(scope="module")
def shipped(cache):
    return look((), cache)


def test_no_shipped_kernel_has_a_fault(shipped):
    assert fault_lines(shipped) == []
    assert {row["verdict"] for row in shipped} == {"ok"}


def test_every_target_is_covered(shipped):
    assert {row["target"] for row in shipped} == LIMITS.keys()


def test_where_hopper_multiplies_it_uses_warp_groups(shipped):
    """Not only where a build expects it: HMMA on sm_90 means a tile that was chosen too small."""
    products = [row for row in shipped if row["target"] == "sm_90" and (row["mma"] or row["wgmma"])]
    assert len(products) >= 4
    assert [row["build"] for row in products if not row["wgmma"]] == []


def jit_kernels():
    """Every `@triton.jit def ..._kernel` of the package."""
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ())]
            if any("jit" in text for text in decorators) and node.name.endswith("_kernel"):
                yield node.name


def test_no_kernel_is_left_out(shipped):
    kernels = set(jit_kernels())
    assert len(kernels) >= 20
    assert sorted(kernels - {row["kernel"] for row in shipped}) == []


def test_every_kernel_compiles_where_all_sizes_are_1(shipped, cache):
    rows = look((str(Path(__file__).parent / "size_one_kernels.py"),), cache)
    assert {row["kernel"] for row in rows} == {row["kernel"] for row in shipped}
    # A real launch would take a smaller tile: what counts is that it compiles.
    assert [line for row in rows if row["registers"] is None for line in fault_lines([row])] == []
