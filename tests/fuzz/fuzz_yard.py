"""Thousands of spoiled files of one kind, each read as a command would read it. Prints what was refused, and how.

`fuzz_yard.py KIND COUNT SEED FOLDER`. A case depends on KIND, SEED and its number alone, so one that fails can be made
again: its file is kept in FOLDER. What a command turns into a line (ValueError, RunError, OSError) is a refusal;
any other exception, ten seconds, or more memory than allowed is a fault.
"""

from __future__ import annotations

import itertools
import json
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fuzz.mutations import spoiled, spoiled_bytes, toml_file
from pipeline.stand_in import Answers, StandIn
from pipeline.tiny import write_suite

from moebench import run as product
from moebench.analyse.compare import compare, flat_rows
from moebench.analyse.load import load_run
from moebench.catalogue.describe import describe
from moebench.catalogue.families import families
from moebench.failures import RunError
from moebench.journal import Journal
from moebench.options import Options
from moebench.plan_text import plan_rows
from moebench.report.html import write_report
from moebench.run_directory import newest_unfinished
from moebench.suite import Suite, load_suite, shipped
from moebench.suite_file import read_source, tomllib

SECONDS = 10  # for one case, of which none should take a hundredth
MEMORY_BYTES = 3 << 30  # of address space, libraries included
MOST_FAULTS = 5
SPOIL_BYTES = 0.4  # share of the cases whose bytes are spoiled; of the others it is what they hold


class Hung(BaseException):
    """No handler for ordinary errors may catch it."""


class Kind(NamedTuple):
    """How files of a kind are made and read.

    Attributes:
        make: a spoiled file, and where it belongs.
        read: reads it; what it raises is judged.
    """

    make: Callable[[random.Random, Path], tuple[Path, bytes]]
    read: Callable[[Path], Any]


# Suites


def make_suite(chance: random.Random, folder: Path) -> tuple[Path, bytes]:
    """From one of those that ship."""
    text = TEXTS[chance.choice(sorted(TEXTS))]
    if chance.random() < SPOIL_BYTES:
        return folder / "fuzz.toml", spoiled_bytes(text.encode(), chance)
    table = toml_file(spoiled(tomllib.loads(text), chance))
    return folder / "fuzz.toml", table.encode("utf-8", "surrogatepass")


def read_suite(path: Path) -> None:
    """As `moebench run suite FILE --dry-run` does, and the first blocks of a run."""
    suite = load_suite([str(path)])
    for block in itertools.islice(suite.blocks("cpu"), 3):
        block.points()
    json.dumps(plan_rows(suite, "cpu", path.parent / "none"), allow_nan=False)


TEXTS = {name: read_source(name)[1] for name in shipped()}


# config.json


def make_config(chance: random.Random, folder: Path) -> tuple[Path, bytes]:
    """From one with every key that its family reads."""
    name = chance.choice(sorted(families()))
    config = {"model_type": name, **families()[name].defaults}
    if chance.random() < 0.2:
        config = {"model_type": "outer", "text_config": config, "tie_word_embeddings": True}
    if chance.random() < SPOIL_BYTES:
        return folder / "config.json", spoiled_bytes(json.dumps(config, indent=2).encode(), chance)
    return folder / "config.json", json.dumps(spoiled(config, chance)).encode()


def read_config(path: Path) -> None:
    """As `moebench describe FILE` does."""
    json.dumps(describe(str(path), 16, "bf16"), allow_nan=False)


# Journals and manifests of a run


def make_journal(chance: random.Random, folder: Path) -> tuple[Path, bytes]:
    """From one with measured, failed, inaccurate and unavailable points."""
    lines = (folder / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    if chance.random() < SPOIL_BYTES:
        return folder / "run" / "journal.jsonl", spoiled_bytes(b"".join(lines), chance)
    place = chance.randrange(len(lines))
    lines[place] = json.dumps(spoiled(json.loads(lines[place]), chance)).encode() + b"\n"
    return folder / "run" / "journal.jsonl", b"".join(lines)


def read_journal(path: Path) -> None:
    """As a report of a killed run does; then a block is appended, which must be there."""
    (path.parent / "results.parquet").unlink(missing_ok=True)
    block = Journal(path.parent.parent / "whole" / "journal.jsonl").read()[:5]
    load_run(path.parent)
    journal = Journal(path)
    journal.append(block)
    found = journal.read()
    assert all(record in found for record in block), "what was appended is not read"


def make_manifest(chance: random.Random, folder: Path) -> tuple[Path, bytes]:
    """From one of a complete run."""
    text = (folder / "whole" / "manifest.json").read_bytes()
    if chance.random() < SPOIL_BYTES:
        return folder / "run" / "manifest.json", spoiled_bytes(text, chance)
    return folder / "run" / "manifest.json", json.dumps(spoiled(json.loads(text), chance)).encode()


def read_manifest(path: Path) -> None:
    """As a report and `--resume` do, of a run of which one block is left to measure."""
    newest_unfinished(path.parent.parent, "ru")
    shutil.copy(path.parent.parent / "half.jsonl", path.parent / "journal.jsonl")
    (path.parent / "results.parquet").unlink(missing_ok=True)
    load_run(path.parent)
    product.run_suite(SUITES["tiny"], Options(path.parent, resume=True))


def make_run(chance: random.Random, folder: Path) -> tuple[Path, bytes]:
    """A run whose journal or manifest is spoiled, the other whole."""
    for name in ("journal.jsonl", "manifest.json"):
        shutil.copy(folder / "whole" / name, folder / "run" / name)
    return chance.choice((make_journal, make_manifest))(chance, folder)


def read_run(path: Path) -> None:
    """As `moebench report` does."""
    (path.parent / "results.parquet").unlink(missing_ok=True)
    write_report([path.parent], path.parent / "report.html")


def read_compared(path: Path) -> None:
    """As `moebench compare` does, with the whole run before and after."""
    (path.parent / "results.parquet").unlink(missing_ok=True)
    whole = load_run(path.parent.parent / "whole")
    other = replace(whole, manifest=whole.manifest.model_copy(update={"run_id": "another"}))
    run = load_run(path.parent)
    for old, new in ((other, run), (run, other)):
        json.dumps(flat_rows(compare(old, new).table), allow_nan=False)


SUITES: dict[str, Suite] = {}


def make_whole_run(folder: Path) -> None:
    """The run whose files are spoiled: `whole`, its copy `run`, and `half.jsonl`, a journal without the last block."""
    answers = Answers()
    cues = {
        ("torch-grouped", "warm"): {"status": "failed", "reason": "ValueError: no"},
        ("torch-compile", "check"): {"rel_error": 0.5, "max_error": 2.0, "wrong": "off by 0.5"},
        ("torch-dense", "provider"): {"unavailable": "missing"},
    }
    product.Remote = lambda *_: StandIn(cues, answers)  # type: ignore[assignment,misc]
    providers = ["torch-loop", "torch-bmm", "torch-grouped", "torch-compile", "torch-dense"]
    SUITES["tiny"] = load_suite([str(write_suite(folder, providers, tokens=[4, 8]))])
    product.run_suite(SUITES["tiny"], Options(folder / "whole"))
    shutil.copytree(folder / "whole", folder / "run")
    lines = (folder / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "half.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))


KINDS = {
    "suites": Kind(make_suite, read_suite),
    "configs": Kind(make_config, read_config),
    "journals": Kind(make_journal, read_journal),
    "manifests": Kind(make_manifest, read_manifest),
    "reports": Kind(make_run, read_run),
    "comparisons": Kind(make_run, read_compared),
}


def fuzz(name: str, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """How many files were taken, how many refused, and the faults."""
    kind, taken, faults = KINDS[name], 0, []
    for number in range(count):
        path, data = kind.make(random.Random(f"{name} {seed} {number}"), folder)
        path.write_bytes(data)
        try:
            signal.alarm(SECONDS)
            kind.read(path)
            taken += 1
        except (ValueError, RunError, OSError) as error:
            # A decoding error is a ValueError too, but one that nobody wrote a line for.
            if not isinstance(error, UnicodeError) and len(str(error)) < 40_000:
                continue
            faults.append(_fault(error, number, path, data, folder))
        except BaseException as error:  # noqa: BLE001 - exactly these are looked for
            faults.append(_fault(error, number, path, data, folder))
        finally:
            signal.alarm(0)
        if len(faults) == MOST_FAULTS:
            break
    return {"taken": taken, "refused": number + 1 - taken - len(faults), "faults": faults}


def _fault(error: BaseException, number: int, path: Path, data: bytes, folder: Path) -> str:
    kept = folder / f"fault{number}-{path.name}"
    kept.write_bytes(data)
    where = [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
    ]
    return f"case {number} ({kept}): {type(error).__name__}: {str(error)[:200]} at {' > '.join(where[-6:])}"


def _hung(*_: object) -> None:
    raise Hung


def main() -> None:
    """As the words say."""
    home = Path(sys.argv[4])
    make_whole_run(home)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, _hung)
    print(json.dumps(fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), home)))


if __name__ == "__main__":
    main()
