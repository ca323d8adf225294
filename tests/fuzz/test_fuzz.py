"""Ten thousand spoiled suites, config.json files, journals and manifests: a line, never a traceback, never a hang.

FUZZ_SEED takes another ten thousand (`any`: others each time), FUZZ_TIMES multiplies them.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.mutations import spoiled, spoiled_bytes, toml_file
from pipeline.tiny import CHECKOUT, environment

from moebench.suite_file import tomllib

# Kind -> files, and the least share of them that is taken and that is refused: both paths have to be walked.
COUNTS = {"suites": 3500, "configs": 3500, "journals": 2000, "manifests": 800, "reports": 100, "comparisons": 100}
BOTH = 0.05


def seed() -> int:
    text = os.environ.get("FUZZ_SEED", "7")
    return secrets.randbelow(10**6) if text == "any" else int(text)


def fuzzed(folder, kind, count, number, before=""):
    """What `fuzz_yard.py` saw; with some statements run before it, as a plant of a bug."""
    path = os.pathsep.join([str(CHECKOUT / "tests"), environment()["PYTHONPATH"]])
    program = f"from fuzz import fuzz_yard as yard\n{before}\nyard.main()"
    words = [sys.executable, "-W", "ignore", "-c", program, kind, str(count), str(number), str(folder)]
    done = subprocess.run(
        words, env=environment(PYTHONPATH=path, OMP_NUM_THREADS="1"),
        capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_no_spoiled_file_is_a_traceback_or_a_hang(tmp_path, kind):
    count, number = COUNTS[kind] * int(os.environ.get("FUZZ_TIMES", "1")), seed()
    print(f"FUZZ_SEED={number}")  # shown where the test fails
    seen = fuzzed(tmp_path, kind, count, number)
    assert seen["faults"] == []
    assert seen["taken"] + seen["refused"] == count
    assert min(seen["taken"], seen["refused"]) > BOTH * count, seen


PLANTS = {
    "a traceback": (
        "configs",
        "import moebench.catalogue.huggingface as it\n"
        "real = it._parse\n"
        "def parse(path):\n"
        "    found = real(path)\n"
        "    return found if found['model_type'] else None['x']\n"
        "it._parse = parse",
        "KeyError|TypeError",
    ),
    "a hang": (
        "journals",
        "import time, moebench.journal as it\n"
        "yard.SECONDS = 1\n"
        "real = it.Journal.append\n"
        "def append(self, records):\n"
        "    time.sleep(1e6 if self.path.exists() and b'\\x00' in self.path.read_bytes() else 0)\n"
        "    real(self, records)\n"
        "it.Journal.append = append",
        "Hung",
    ),
    "endless memory": (
        "suites",
        "import moebench.suite_file as it\n"
        "real = it._has_endless_key\n"
        "it._has_endless_key = lambda text: real(text) or ('zipf:1e400' in text and not bytearray(1 << 40))",
        "MemoryError",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_found(tmp_path, plant):
    kind, before, expected = PLANTS[plant]
    faults = fuzzed(tmp_path, kind, 1500, 1, before)["faults"]
    assert faults
    assert all(any(name in fault for name in expected.split("|")) for fault in faults), faults
    kept = Path(faults[0].partition("(")[2].partition(")")[0])
    assert kept.exists(), "the file that did it is kept"


def test_every_mutation_is_made_again_from_its_seed():
    table = {"a": 1, "b": [1.5, "x", {"c": True}], "sweep": [{"grid": {"tokens": [1, 2, 4]}}]}
    for number in range(200):
        one, other = (spoiled(table, random.Random(number)) for _ in (1, 2))
        assert repr(one) == repr(other)
        one, other = (spoiled_bytes(b"name = 1\n" * 9, random.Random(number)) for _ in (1, 2))
        assert one == other
    assert table["a"] == 1, "what is spoiled is a copy"


def test_plain_data_survives_as_toml():
    table = {"name": 'é " \\ \n', "n": [1, -2.5, True, 1e300], "sweep": [{"grid": {"a.b": "x", "": []}}]}
    assert tomllib.loads(toml_file(table)) == table
