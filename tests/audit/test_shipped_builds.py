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

OLDER = Path(__file__).parents[1] / "kernels" / "compile_kernels.py"
FOLDER = Path(next(iter(importlib.util.find_spec("moebench_kernels").submodule_search_locations)))


@pytest.fixture(scope="module")
def shipped(cache):
    before = os.environ.get("MOEBENCH_CACHE")
    os.environ["MOEBENCH_CACHE"] = cache
    try:
        return audit(Request()).rows
    finally:
        os.environ.pop("MOEBENCH_CACHE") if before is None else os.environ.update(MOEBENCH_CACHE=before)


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
    assert len(kernels) >= 10
    # Kernels that do not declare their builds yet are compiled by an older list.
    listed = OLDER.read_text() if OLDER.exists() else ""
    missing = kernels - {row["kernel"] for row in shipped}
    assert sorted(name for name in missing if name not in listed) == []
