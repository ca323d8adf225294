"""The commit in a manifest: seen in the checkout, or stated where a tree was copied without its history."""

import subprocess

import pytest

from moebench import manifest
from moebench.manifest import stated_commit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_stated_commit_counts_only_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEBENCH_COMMIT", f" {COMMIT.upper()}\n")
    here = tmp_path / "moebench" / "manifest.py"
    here.parent.mkdir()
    here.touch()
    (here.parent / "run.py").touch()
    monkeypatch.setattr(manifest, "__file__", str(here))
    assert manifest._git() == {"git_commit": COMMIT, "git_dirty": None}

    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    seen = manifest._git()
    assert seen["git_dirty"] is False
    assert seen["git_commit"] not in (None, COMMIT)


@pytest.mark.parametrize("text", ["main", COMMIT[:10], COMMIT + "0", "x" * 40, "<b>" * 20])
def test_what_is_no_commit_is_refused(monkeypatch, text):
    monkeypatch.setenv("MOEBENCH_COMMIT", text)
    with pytest.raises(ValueError, match="must be the 40 hex digits of `git rev-parse HEAD`") as said:
        stated_commit()
    assert len(str(said.value).splitlines()) == 1


def test_nothing_stated(monkeypatch):
    monkeypatch.setenv("MOEBENCH_COMMIT", "  ")
    assert stated_commit() is None
