"""The wheel: what is in it, and that it works where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from pipeline.tiny import CHECKOUT

pytestmark = pytest.mark.wheel

PACKAGES = {"moebench": "moebench", "moebench_kernels": "kernels/moebench_kernels", "moebench_suites": "suites"}
SHIPPED = {".py", ".toml", ".csv", ".html", ".js", ".css", ".typed"}


def alone(words, folder):
    """A command that knows nothing of the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(word) for word in words], cwd=folder, env=kept, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing of an earlier build is in it and the checkout stays as it is."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(CHECKOUT / name, copy)
    for name in ("moebench", "kernels", "suites", "tests"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = alone([sys.executable, "-m", "pip", "wheel", copy, "--no-deps", "--quiet", "--wheel-dir", out], out)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_all_that_is_read_at_run_time_and_nothing_else(wheel):
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    info = {name for name in names if name.parts[0].endswith(".dist-info")}
    expected = {
        Path(package) / path.relative_to(CHECKOUT / folder)
        for package, folder in PACKAGES.items()
        for path in (CHECKOUT / folder).rglob("*")
        if path.suffix in SHIPPED or path.name == "py.typed"
    }
    assert names - info == expected
    for name in ("moebench/py.typed", "moebench_suites/quick.toml", "moebench/report/page.html"):
        assert Path(name) in names
    assert {path.name for path in names if path.suffix == ".csv"} >= {"models.csv", "hardware.csv", "families.csv"}


@pytest.fixture(scope="session")
def elsewhere(wheel, tmp_path_factory):
    """The folder of programs of an environment that has the wheel, and the libraries of this one."""
    home = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    done = alone(install, home)
    assert done.returncode == 0, done.stderr
    (site,) = home.glob("lib/python*/site-packages")
    libraries = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    # PyTorch is borrowed: a path in a .pth file is searched last, and the .pth files it holds are not read.
    (site / "borrowed.pth").write_text("\n".join(sorted(libraries)) + "\n")
    return home / "bin"


def test_nothing_is_taken_from_the_checkout(elsewhere, tmp_path):
    program = (
        "import json, moebench, moebench_kernels, moebench_suites\n"
        "print(json.dumps([moebench.__file__, moebench_kernels.__file__, moebench_suites.__file__]))"
    )
    done = alone([elsewhere / "python", "-c", program], tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(Path(file).is_relative_to(elsewhere.parent) for file in json.loads(done.stdout))
    listed = alone([elsewhere / "moebench", "list", "suites", "--json"], tmp_path)
    assert {row["name"] for row in json.loads(listed.stdout)} >= {"smoke", "quick", "sweep"}


@pytest.mark.slow
def test_smoke_runs_in_an_empty_folder(elsewhere, tmp_path):
    """Exit code 0: every provider that can be run here gives the oracle's answer."""
    done = alone([elsewhere / "moebench", "run", "suite", "smoke", "--json"], tmp_path)
    assert done.returncode == 0, done.stderr
    (outcome,) = json.loads(done.stdout)
    assert outcome["measured"] > 0
    page = tmp_path / outcome["report"]
    assert page.name == "report.html"
    assert "torch-bmm" in page.read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["moebench-runs"]
