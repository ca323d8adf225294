"""One audit of the file with all kinds of kernels, shared by the tests; its cache is kept between runs of pytest."""

import importlib.util
import os
from pathlib import Path

import pytest

from moebench.audit.run import Request, audit

HERE = Path(__file__).parent
KERNELS = HERE / "audited_kernels.py"


def pytest_collection_modifyitems(items):
    """Skip all here where there is no triton to compile with, saying so."""
    if importlib.util.find_spec("triton") is None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="the audit compiles with triton, which is not installed"))


@pytest.fixture(scope="session")
def cache(pytestconfig):
    """Where facts are kept: in pytest's own cache, so that a second run of the tests is quick."""
    return str(pytestconfig.cache.mkdir("moebench-audit"))


@pytest.fixture(autouse=True)
def _cache_here(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", cache)


@pytest.fixture(scope="session")
def rows(cache):
    """(build, target) -> row of audited_kernels.py."""
    before = os.environ.get("MOEBENCH_CACHE")
    os.environ["MOEBENCH_CACHE"] = cache
    try:
        found = audit(Request((str(KERNELS),), all=True))
    finally:
        os.environ.pop("MOEBENCH_CACHE") if before is None else os.environ.update(MOEBENCH_CACHE=before)
    return {(row["build"], row["target"]): row for row in found.rows}
