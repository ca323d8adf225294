"""Runs by the dozen, killed or starved: one process imports everything once and forks each run, with a worker of straw.

`yard.py kills FOLDER COUNT SEED` kills COUNT runs with SIGKILL, each in a stage of its own choosing and a random time
after that stage began, and goes on with each folder until it is complete. `yard.py full FOLDER COUNT` lets files grow
to COUNT different sizes and no further. Both print what they saw as JSON; the tests judge.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import resource
import signal
import statistics
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.pandas_compat  # noqa: F401 - imported once, so that no run has to
import scipy.stats  # noqa: F401
from pipeline.stand_in import Answers, StandIn
from pipeline.tiny import write_suite

from moebench import run as product
from moebench.failures import RunError
from moebench.journal import Journal
from moebench.options import Options
from moebench.suite import Suite, load_suite

TOKENS = [4, 8, 16, 32]
PER_BLOCK = 5  # lines
STAGES = {b"s": "start", b"b": "block", b"j": "journal", b"t": "table", b"m": "manifest", b"e": "end"}
KILLS_OF_ONE_RUN = 4  # a run that goes on is killed too
Marks = list[tuple[bytes, float]]


def journalled(run: Path) -> dict[str, str]:
    """Point -> its record as text, of the blocks that are whole: of those nothing may change.

    A kill can leave a part of a block's lines. They are its rows until the block is measured again, whole.
    """
    records = Journal(run / "journal.jsonl").read()
    lines = Counter(record.block_id for record in records)
    return {record.point_id: record.model_dump_json() for record in records if lines[record.block_id] == PER_BLOCK}


class Run:
    """A run in a forked process that tells, by one byte each, which stage it has come to."""

    def __init__(self, suite: Suite, out: Path, *, resume: bool, max_file_bytes: int | None = None) -> None:
        self.marks: Marks = []
        self._pipe, told = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._pipe)
            _be_a_run(suite, Options(out, resume=resume), told, max_file_bytes)
        os.close(told)

    def until(self, stage: bytes, times: int = 1) -> bool:
        """Wait for the n-th time that it comes to a stage; False where it ends before."""
        while byte := os.read(self._pipe, 1):
            self.marks.append((byte, time.monotonic()))
            times -= byte == stage
            if not times:
                return True
        return False

    def end(self) -> int:
        """Wait for its end: the exit code, or minus the signal."""
        self.until(b"")
        os.close(self._pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _be_a_run(suite: Suite, options: Options, told: int, max_file_bytes: int | None) -> NoReturn:
    """What the forked process does; its exit code is the command's, 99 for what would be a traceback."""
    code = 99
    try:
        os.setsid()
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
        # Another measurement gives other numbers, so that one that takes another's place is seen.
        answers = Answers(latency_ms=random.SystemRandom().uniform(1.0, 2.0))
        product.Remote = lambda *_: StandIn({}, answers)  # type: ignore[assignment,misc]
        _mark_stages(lambda stage: os.write(told, stage))
        try:
            code = product.run_suite(
                suite, options, product.Progress(block=lambda block: os.write(told, b"b"))
            ).exit_code
            os.write(told, b"e")
        except (RunError, ValueError) as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            options.out.with_suffix(".said").write_text(str(error))
            code = 1 if isinstance(error, RunError) else 2
    except BaseException:  # noqa: BLE001 - a forked process must not go on as its parent
        options.out.with_suffix(".traceback").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _mark_stages(mark: Callable[[bytes], Any]) -> None:
    mark(b"s")
    append, write_results = Journal.append, product.write_results

    def marked_append(*arguments: Any) -> None:
        mark(b"j")
        append(*arguments)

    def marked_results(*arguments: Any) -> None:
        mark(b"t")
        write_results(*arguments)
        mark(b"m")

    Journal.append = marked_append  # type: ignore[method-assign]
    product.write_results = marked_results


def kills(folder: Path, suite: Suite, count: int, seed: int) -> dict[str, Any]:
    """Kill `count` runs; says where each kill landed and what went wrong."""
    chance, lengths = random.Random(seed), _lengths_of_stages(suite, folder / "clean")
    stages, landed, faults, runs = itertools.cycle(STAGES), Counter[str](), [], []
    while landed.total() < count:
        run, kept = folder / f"run{len(runs)}", {}
        runs.append(run.name)
        for number in range(KILLS_OF_ONE_RUN):
            stage = next(stages)
            running = Run(suite, run, resume=number > 0)
            came = running.until(stage, chance.randint(1, 2) if stage in b"bj" else 1)
            if came:
                time.sleep(chance.uniform(0.0, 1.2 * lengths[stage]))
                os.kill(running.pid, signal.SIGKILL)
            code = running.end()
            faults += _lost(run, kept, f"{run.name}, session {number}, killed in {STAGES[stage]}: ")
            if code == -signal.SIGKILL:
                landed[STAGES[running.marks[-1][0]]] += 1
            elif code:
                faults.append(f"{run.name}: exit code {code} in {STAGES[stage]}")
            if code != -signal.SIGKILL or landed.total() == count:
                break
        code = Run(suite, run, resume=True).end()
        faults += [f"{run.name}: exit code {code} at last"] if code else []
        faults += _lost(run, kept, f"{run.name}, at last: ")
    return {"landed": landed, "faults": faults, "runs": runs}


def _lost(run: Path, kept: dict[str, str], where: str) -> list[str]:
    """Records that were in the journal and are not there as they were; `kept` becomes what is there now."""
    found = journalled(run)
    lost = [f"{where}{key} is {found.get(key)}, was {text}" for key, text in kept.items() if found.get(key) != text]
    kept.update(found)
    return lost


def _lines(run: Path) -> int:
    """Lines of the journal, a torn one too."""
    journal = run / "journal.jsonl"
    return len(journal.read_bytes().splitlines()) if journal.exists() else 0


def _lengths_of_stages(suite: Suite, out: Path) -> dict[bytes, float]:
    """Seconds that a run spends in each stage, at the median of one that nothing disturbs."""
    running = Run(suite, out, resume=False)
    assert running.end() == 0
    lengths = defaultdict(list)
    for (stage, begun), (_, ended) in itertools.pairwise([*running.marks, (b"", time.monotonic())]):
        lengths[stage].append(ended - begun)
    return {stage: statistics.median(found) for stage, found in lengths.items()}


def full(folder: Path, suite: Suite, count: int) -> dict[str, Any]:
    """`count` runs whose files cannot grow past sizes from nothing to the largest file's; each then goes on."""
    assert Run(suite, folder / "clean", resume=False).end() == 0
    largest = max(entry.stat().st_size for entry in (folder / "clean").iterdir())
    runs = []
    for number in range(count):
        run = folder / f"run{number}"
        # Numbers have more digits in one run than in another, which makes a fifth of a journal.
        size = 3 * largest * number // (4 * count)
        code = Run(suite, run, resume=False, max_file_bytes=size).end()
        said = run.with_suffix(".said")
        kept = journalled(run)
        written, torn = len(kept), _lines(run) - len(kept)
        last = Run(suite, run, resume=True).end()
        faults = _lost(run, kept, "")
        runs.append({
            "run": run.name, "bytes": size, "code": code, "said": said.read_text() if said.exists() else "",
            "kept": written, "torn": torn, "last": last, "faults": faults,
        })  # fmt: skip
    return {"runs": runs}


if __name__ == "__main__":
    home, numbers = Path(sys.argv[2]), [int(word) for word in sys.argv[3:]]
    gc.freeze()  # what is never collected is never copied by a fork
    every = load_suite([str(write_suite(home, tokens=TOKENS))])
    print(json.dumps({"kills": kills, "full": full}[sys.argv[1]](home, every, *numbers)))
