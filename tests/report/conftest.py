"""Runs, pages and a browser shared by the report's tests."""

import os

import pytest
from report.browser import Page, find_browser, start
from report.synthetic import make_run

from moebench.report.html import write_report


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """name -> report file: quick (like a CPU run), full (stages, prices, two precisions), hostile, many."""
    kinds = {
        "quick": {},
        "full": {"stages": True, "priced": True, "precisions": ("fp32", "bf16")},
        "hostile": {"hostile": True, "tokens": (1, 16)},
        "many": {"records": 3000, "rounds": 3},
    }
    folder = tmp_path_factory.mktemp("reports")
    return {
        name: write_report([make_run(folder / name, **options)], folder / f"{name}.html")
        for name, options in kinds.items()
    }


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    if find_browser() is None:
        missing = "no Chromium or Chrome was found (set CHROME to one, or install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    driver = start(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver):
    return Page(driver)
