"""What a run was begun with has changed when it is to go on: it is refused, and every change is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.fault_checks import PER_BLOCK, complete, contents, second_block
from pipeline.tiny import records, write_suite

from moebench.point import SCHEMA_VERSION
from moebench.suite import Suite, load_suite

ROUTER = '''
import torch

def gate(x, w):
    """Picks the two highest."""
    weights, ids = (x.float() @ w.float().T).softmax(-1).topk(2, dim=-1)
    return ids, weights
'''


@pytest.fixture
def stopped(tmp_path, crew, go):
    """Stops the suite, as loaded with some words, in the second block; gives a check of how going on is refused."""

    def stop(suite: Suite, **options):
        crew.cues["torch-bmm", "burst"] = lambda: interrupt() if second_block(crew) else {}
        assert go(suite, **options).interrupted
        crew.cues.clear()
        before = contents(tmp_path / "run")
        kept = records(tmp_path / "run")
        assert len(kept) == PER_BLOCK

        def refused(other: Suite, **changed) -> str:
            with pytest.raises(ValueError, match="run cannot be resumed, since this changed: ") as error:
                go(other, resume=True, **{**options, **changed})
            assert contents(tmp_path / "run") == before
            assert "\n" not in str(error.value)
            return str(error.value).partition("changed: ")[2]

        return refused

    return stop


def interrupt():
    raise KeyboardInterrupt


def loaded(tmp_path: Path, overrides=None, **options) -> Suite:
    return load_suite([str(tmp_path / "tiny.toml")], overrides, **options)


def rewritten(tmp_path: Path, old: str, new: str) -> Suite:
    path = tmp_path / "tiny.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return loaded(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("top_k = 2", "top_k = 1", "line 11: 'top_k = 2' then, 'top_k = 1' now"),
        ("tokens = [4, 8, 16]", "tokens = [4, 8]", "line 12: 'tokens = [4, 8, 16]' then, 'tokens = [4, 8]' now"),
        ("top_k = 2", "top_k = 2 # two", "line 11: 'top_k = 2' then, 'top_k = 2 # two' now"),
        ("top_k = 2\n", "\ntop_k = 2\n", "line 11: 'top_k = 2' then, '' now"),
    ],
)
def test_the_suite_file_with_its_first_line_that_differs(tmp_path, stopped, old, new, said):
    refused = stopped(loaded(tmp_path))
    assert refused(rewritten(tmp_path, old, new)) == f"the suite file ({said})"


def test_a_line_more_at_the_end(tmp_path, stopped):
    path = tmp_path / "tiny.toml"
    refused, text = stopped(loaded(tmp_path)), path.read_text()
    path.write_text(text + "# more")
    number = text.count("\n") + 1
    assert refused(loaded(tmp_path)) == f"the suite file (line {number}: '' then, '# more' now)"


def test_a_change_far_down_a_long_line_is_shown(tmp_path, stopped):
    path = tmp_path / "tiny.toml"
    path.write_text(path.read_text() + "# " + "x" * 500 + " then\n")
    refused = stopped(loaded(tmp_path))
    said = refused(rewritten(tmp_path, "x then", "x now"))
    assert said.endswith("xxx then' then, 'xxxxxxxxxxxxxxxxxxx now' now)")
    assert len(said) < 120


def test_overrides_and_added_providers(tmp_path, stopped):
    suite = loaded(tmp_path, {"tokens": ["4", "8"], "provider": ["torch-loop", "torch-bmm"]})
    refused = stopped(suite)
    other = loaded(tmp_path, {"tokens": ["4", "8", "16"], "seed": ["3"]}, add_providers=["torch-grouped"])
    assert refused(other).split("; ")[:4] == [
        "--provider ('torch-loop,torch-bmm' then, not given now)",
        "--set seed (not given then, '3' now)",
        "--set tokens ('4,8' then, '4,8,16' now)",
        "--provider (not given then, 'torch-grouped' now)",
    ]


def test_the_contents_of_a_router_file(tmp_path, stopped):
    mine = tmp_path / "mine.py"
    mine.write_text(ROUTER)
    refused = stopped(loaded(tmp_path, {"router": [f"{mine}:gate"]}))
    mine.write_text(ROUTER.replace("highest", "first"))
    assert refused(loaded(tmp_path, {"router": [f"{mine}:gate"]})) == f"the contents of {mine}"


def test_shard_and_check_only_and_all_at_once(tmp_path, crew, go, stopped):
    refused = stopped(loaded(tmp_path))
    assert refused(loaded(tmp_path), shard=(1, 3)) == "--shard (1/1 then, 1/3 now)"
    assert refused(loaded(tmp_path), check_only=True) == "--check-only (not given then, given now)"
    crew.cues["", "hello"] = {"device": "Hay"}
    said = refused(rewritten(tmp_path, "tokens = [4, 8, 16]", "tokens = [4]"), shard=(2, 3), check_only=True)
    assert said.split("; ") == [
        "the suite file (line 12: 'tokens = [4, 8, 16]' then, 'tokens = [4]' now)",
        "--shard (1/1 then, 2/3 now)",
        "--check-only (not given then, given now)",
        "the device (Straw then, Hay now)",
    ]
    crew.cues.clear()
    kept = records(tmp_path / "run")
    assert go(rewritten(tmp_path, "tokens = [4]", "tokens = [4, 8, 16]"), resume=True).exit_code == 0
    complete(tmp_path / "run", blocks=3, kept=kept)


def test_two_files_of_one_run_are_one_text(tmp_path, stopped):
    (tmp_path / "more").mkdir()
    other = write_suite(tmp_path / "more", tokens=[32])
    paths = [str(tmp_path / "tiny.toml"), str(other)]
    refused = stopped(load_suite(paths))
    lines = (tmp_path / "tiny.toml").read_text().count("\n")
    assert (
        refused(load_suite(paths[:1])) == f"the suite file (line {lines + 2}: 'name = \"tiny\"' then, no such line now)"
    )


def test_a_run_of_another_schema_is_refused(tmp_path, stopped, go):
    stopped(loaded(tmp_path))
    path = tmp_path / "run" / "manifest.json"
    path.write_text(path.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 2'))
    with pytest.raises(ValueError, match=f"is of schema 2, and this moebench goes on with {SCHEMA_VERSION}; start in"):
        go(resume=True)
