"""From Python: `run(...)` with functions beside the suite's own providers."""

import pytest
from pipeline import kernels_of_all_kinds as kernels
from pipeline.tiny import records, write_suite

from moebench.api import reference, run


def test_a_function_of_a_file_joins_the_race(tmp_path, crew):
    suite = write_suite(tmp_path)
    outcome = run(str(suite), out=tmp_path / "run", providers=[kernels.right], overrides={"tokens": [8]})
    assert outcome.exit_code == 0
    rows = records(tmp_path / "run")
    assert {row.provider for row in rows} >= {"torch-loop", "torch-bmm", f"{kernels.__file__}:right"}
    assert {row.tokens for row in rows} == {8}


def test_resuming(tmp_path, crew):
    suite = write_suite(tmp_path, tokens=[4, 8])
    crew.cues["torch-bmm", "check"] = KeyboardInterrupt()
    assert run(str(suite), out=tmp_path / "run").exit_code == 130
    crew.cues.clear()
    assert run(str(suite), out=tmp_path / "run", resume=True).exit_code == 0


def test_what_a_worker_could_not_import_is_refused():
    def closure(*_): ...

    for function in (lambda *_: None, closure, print, object()):
        with pytest.raises(ValueError, match=r"is no function at the top level of a \.py file"):
            reference(function)
    assert reference(kernels.right) == f"{kernels.__file__}:right"
