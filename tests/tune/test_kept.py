"""The tuned file: loadable after every case, resumable, refused when it is another's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moebench.tune.case import Case, cases, layers_of
from moebench.tune.kept import Kept
from moebench.tune.race import Result, Runner
from moebench_kernels import runtime
from moebench_kernels.tiles import GemmConfig
from moebench_kernels.tuned_tiles import load_tuned

TILE = GemmConfig(128, 64, 8, 3)
MADE_WITH = {
    "device": "Test GPU", "device_family": "sm_90", "triton": runtime.triton.__version__, "source": "abc",
    "moebench": "0",
}  # fmt: skip


def case() -> Case:
    return cases(layers_of([], ["8,64,32,2"]), [16], ["bf16"])[0]


def won(ms: float = 1.0) -> Result:
    return Result(TILE, ms, 2 * ms, True, [Runner(TILE, [ms])])


def test_the_library_loads_what_the_tuner_writes(tmp_path: Path) -> None:
    path, one = tmp_path / "deep" / "t.json", case()
    kept = Kept(path, MADE_WITH, resume=False)
    assert not kept.has(one)
    kept.add(one, won())
    assert kept.has(one)
    found = load_tuned(path).nearest(one.kind, torch.bfloat16, one.block_m, one.n, one.k)
    assert found == TILE
    assert [entry.name for entry in path.parent.iterdir()] == ["t.json"]


def test_resume_goes_on(tmp_path: Path) -> None:
    path, one = tmp_path / "t.json", case()
    Kept(path, MADE_WITH, resume=False).add(one, won())
    again = Kept(path, MADE_WITH, resume=True)
    other = replace(one, n=one.n * 2)
    assert again.has(one)
    assert not again.has(other)
    again.add(other, Result(None, None, None, False, [Runner(TILE, wrong="it raised")]))
    content = json.loads(path.read_text())
    assert [entry["n"] for entry in content["entries"]] == [one.n]
    assert content["failed"][0]["reasons"] == ["it raised"]
    assert Kept(path, MADE_WITH, resume=True).has(other)


@pytest.mark.parametrize("name", ["device", "device_family", "source"])
def test_another_machines_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "t.json"
    Kept(path, MADE_WITH, resume=False).add(case(), won())
    changed = MADE_WITH | {name: "sm_80" if name == "device_family" else "else"}
    with pytest.raises(ValueError, match=f"was made with {name} "):
        Kept(path, changed, resume=True)


def test_an_existing_file_needs_resume(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    Kept(path, MADE_WITH, resume=False).add(case(), won())
    with pytest.raises(ValueError, match="exists; --resume goes on with it"):
        Kept(path, MADE_WITH, resume=False)


@pytest.mark.parametrize(
    "failed", [[{}], ["x"], 3, [{"kind": "rows"}], [{"kind": [], "dtype": 1, "block_m": 1, "n": 1, "k": 1}]]
)
def test_damaged_failures_are_one_line(tmp_path: Path, failed: object) -> None:
    path = tmp_path / "t.json"
    Kept(path, MADE_WITH, resume=False)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"failed": failed}))
    with pytest.raises(ValueError, match=r"t\.json: failed is no list of objects with kind, dtype"):
        Kept(path, MADE_WITH, resume=True)


def test_a_place_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Kept(tmp_path / "file" / "t.json", MADE_WITH, resume=False)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 2}', '{"schema": 1, "entries": 3}'])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"t\.json"):
        Kept(path, MADE_WITH, resume=True)
