"""The folder of a run: made, entered, locked, or refused in one line."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from moebench.run_directory import RunDirectory, RunDirectoryError, newest_unfinished

NOBODY = 65534


def refusal(path, *, resume=False):
    with pytest.raises(RunDirectoryError) as error, RunDirectory(path).opened(resume=resume):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(path):
    return sorted(entry.name for entry in path.iterdir())


@contextmanager
def as_nobody():
    """Root may write anywhere, so it steps down for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that everyone can look into (pytest's own are private)."""
    folder = Path(tempfile.mkdtemp(prefix="moebench-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_folder_is_made_with_its_parents(tmp_path, resume):
    with RunDirectory(tmp_path / "a" / "b").opened(resume=resume) as before:
        assert before is None
        assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("resume", [False, True])
def test_an_empty_folder_is_used(tmp_path, resume):
    with RunDirectory(tmp_path).opened(resume=resume) as before:
        assert before is None


def test_a_folder_that_holds_anything_is_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert refusal(tmp_path) == f"{tmp_path} exists and is not empty; choose another --out"
    assert contents(tmp_path) == ["thesis.tex"]


def test_a_run_is_gone_on_with_only_when_asked_for(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    assert refusal(tmp_path) == f"{tmp_path} exists and is not empty; use --resume to go on with it, or another --out"


def test_resuming_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert refusal(tmp_path, resume=True) == f"{tmp_path} is not a run directory (it holds 'thesis.tex')"


@pytest.mark.parametrize("left", [["lock", "worker.log"], ["lock", "manifest.json.partial"], ["lock"]])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_refused_before_it_began_leaves_its_folder_free(tmp_path, left, resume):
    """After a mistyped provider the same command, corrected, must work."""
    for name in left:
        (tmp_path / name).touch()
    with RunDirectory(tmp_path).opened(resume=resume) as before:
        assert before is None


@pytest.mark.parametrize("text", [b"", b"{", b"{}", b"\xff", b'{"run_id": 3}', b"null"])
def test_a_damaged_manifest_is_one_line(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text)
    assert refusal(tmp_path, resume=True).startswith(f"{tmp_path / 'manifest.json'} is damaged (")


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_is_no_folder(tmp_path, resume):
    path = tmp_path / "run"
    path.write_text("precious")
    assert refusal(path, resume=resume) == f"{path} is a file; --out names a folder"
    assert refusal(path / "below", resume=resume) == f"{path / 'below'} cannot be created: Not a directory"
    assert path.read_text() == "precious"


def test_a_folder_in_which_nothing_can_be_made(open_folder):
    open_folder.chmod(0o555)
    with as_nobody():
        assert refusal(open_folder / "run") == f"{open_folder / 'run'} cannot be created: Permission denied"


@pytest.mark.parametrize("resume", [False, True])
def test_a_read_only_folder(open_folder, resume):
    open_folder.chmod(0o555)
    with as_nobody():
        assert refusal(open_folder, resume=resume) == f"{open_folder} cannot be written: Permission denied"


def test_the_lock_is_freed_at_the_end_also_after_an_error(tmp_path):
    def fail():
        with RunDirectory(tmp_path).opened(resume=False):
            assert refusal(tmp_path, resume=True) == f"{tmp_path} is being written by another run"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with RunDirectory(tmp_path).opened(resume=True):
        pass


def test_the_newest_unfinished_run_of_a_suite_is_found(tmp_path):
    for name, text in {
        "quick-1": '{"finished": null}',
        "quick-2": '{"finished": "interrupted"}',
        "quick-3": '{"finished": "complete"}',
        "sweep-9": '{"finished": null}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    assert newest_unfinished(tmp_path, "quick") == tmp_path / "quick-2"
    assert newest_unfinished(tmp_path, "smoke") is None
    assert newest_unfinished(tmp_path / "none", "quick") is None
    (tmp_path / "quick-4").mkdir()
    assert newest_unfinished(tmp_path, "quick") == tmp_path / "quick-4", "stopped before its manifest"
