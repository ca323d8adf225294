"""A run, with workers of straw: what is written, what is left when it is stopped anywhere, and what resuming asks."""

import errno
import json
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
from pipeline.tiny import records, write_suite, written_points

from moebench.failures import RunError
from moebench.options import Options, default_command, resume_command
from moebench.point import digest
from moebench.record import COLUMNS, PERFORMANCE
from moebench.remote import WorkerLost
from moebench.run import Progress, run_suite
from moebench.run_directory import RunDirectory
from moebench.suite import load_suite

MESSAGES = ("hello", "provider", "ceilings", "open", "arm", "yardstick", "check", "warm", "memory", "state_begin",
            "burst", "state_end")  # fmt: skip
TOKENS = [4, 8]
PER_BLOCK = 5  # two arms and three yardsticks


def suite_of(tmp_path, text="", overrides=None, **options):
    path = write_suite(tmp_path, **{"tokens": TOKENS, **options})
    path.write_text(text + path.read_text())
    return load_suite([str(path)], overrides)


def go(tmp_path, suite=None, **options):
    return run_suite(suite or suite_of(tmp_path), Options(tmp_path / "run", **options))


def manifest(tmp_path):
    return json.loads((tmp_path / "run" / "manifest.json").read_text())


def table(tmp_path):
    return pd.read_parquet(tmp_path / "run" / "results.parquet")


def every_point_once(tmp_path):
    rows = records(tmp_path / "run")
    keys = [(row.point_id, row.replicate) for row in rows]
    assert len(keys) == len(set(keys)) == len(TOKENS) * PER_BLOCK
    found = table(tmp_path)
    assert sorted(zip(found["point_id"], found["replicate"], strict=True)) == sorted(keys)
    return rows


# What is written


def test_a_run_writes_its_manifest_journal_and_table(tmp_path, crew):
    outcome = go(tmp_path, command="moebench run suite tiny.toml")
    assert (outcome.exit_code, dict(outcome.counts), outcome.interrupted) == (0, {"measured": 4}, False)
    rows = every_point_once(tmp_path)
    assert {row.status for row in rows} == {"measured"}
    assert [row.role for row in rows if row.block_id == rows[0].block_id] == ["arm"] * 2 + ["yardstick"] * 3
    assert list(table(tmp_path).columns) == list(COLUMNS)
    written = manifest(tmp_path)
    assert (written["finished"], written["sessions"], written["points"]) == ("complete", 1, 4)
    assert written["command"] == "moebench run suite tiny.toml"
    assert written["suite_text"] == (tmp_path / "tiny.toml").read_text()
    assert set(written["providers"]) == {"torch-loop", "torch-bmm", "copy", "read", "gemm"}
    assert all(worker.ended for worker in crew.workers)
    assert len(crew.workers) == 1


def test_the_numbers_are_those_of_the_samples(tmp_path, crew):
    go(tmp_path)
    row = next(row for row in records(tmp_path / "run") if row.provider == "torch-bmm" and row.tokens == 8)
    assert (row.latency_ms, row.latency_ms_low, row.latency_ms_high) == (1.0, 1.0, 1.0)
    assert row.tokens_per_s == 8000.0
    assert row.peak_memory_bytes == 1 << 20
    assert (row.timer, row.prepare_ms, row.rel_error) == ("straw", 1.0, 1e-7)
    assert (row.cache, row.timer_reason, row.first_call_ms) == ("cold", None, 2.0)
    assert row.wall_samples_ms is None, "the host's clock is the only one"
    assert row.limit_ms is not None, "the straw has ceilings"
    assert row.limit_fraction == row.limit_ms
    assert row.flags == []
    unknown = ("usd_per_mtok", "gco2_per_mtok", "s_mfu", "s_mbu", "energy_source", "energy_j_per_token")
    assert [name for name in unknown if getattr(row, name) is not None] == [], "nothing says what straw costs"


def test_flags_of_the_machine_reach_every_timed_row_of_the_block(tmp_path, crew):
    crew.cues["", "state_end"] = {"flags": ["contended"]}
    crew.cues["torch-bmm", "memory"] = {"peak_memory_bytes": 100}
    go(tmp_path)
    rows = records(tmp_path / "run")
    assert all("contended" in row.flags for row in rows)
    assert {row.provider for row in rows if "memory_below_resolution" in row.flags} == {"torch-bmm"}


def test_the_ceilings_of_a_suite_that_names_no_precision_are_probed_for_the_default(tmp_path, crew):
    go(tmp_path)
    assert crew.asked("ceilings")[0].arguments["precisions"] == ["fp32"]
    assert manifest(tmp_path)["ceilings"]["gemm_tflops"] == {"fp32": 0.1}


def test_faults_make_the_exit_code_and_keep_their_reasons(tmp_path, crew):
    crew.cues["torch-bmm", "warm"] = {"status": "failed", "reason": "ValueError: no"}
    outcome = go(tmp_path)
    assert outcome.exit_code == 1
    assert dict(outcome.counts) == {"measured": 2, "failed": 2}
    assert dict(outcome.reasons) == {("torch-bmm", "failed", "ValueError: no"): 2}
    failed = [row for row in every_point_once(tmp_path) if row.status == "failed"]
    assert all(getattr(row, name) is None for row in failed for name in PERFORMANCE)
    assert {row.rel_error for row in failed} == {1e-7}, "it had passed its check"


def test_a_faulty_yardstick_is_not_the_users_fault(tmp_path, crew):
    crew.cues["copy", "warm"] = {"status": "failed", "reason": "no"}
    assert go(tmp_path).exit_code == 0


def test_nothing_good_at_all_is_no_success(tmp_path, crew):
    for name in ("torch-loop", "torch-bmm"):
        crew.cues[name, "provider"] = {"unavailable": "missing"}
    outcome = go(tmp_path)
    assert dict(outcome.counts) == {"unavailable": 4}
    assert outcome.exit_code == 1


def test_check_only_verifies_without_ceilings_yardsticks_or_times(tmp_path, crew):
    outcome = go(tmp_path, check_only=True)
    assert (outcome.exit_code, dict(outcome.counts)) == (0, {"verified": 4})
    assert crew.asked("ceilings") == crew.asked("yardstick") == crew.asked("burst") == []
    assert {row.checked_on for row in records(tmp_path / "run")} == {"T4 D16 F8 E4 K2"}
    assert manifest(tmp_path)["ceilings"] is None


def test_each_replicate_has_a_fresh_worker(tmp_path, crew):
    suite = suite_of(tmp_path, "replicates = 3\n", tokens=[4])
    go(tmp_path, suite)
    assert len(crew.workers) == 3
    arms = [row for row in records(tmp_path / "run") if row.provider == "torch-loop"]
    assert [(row.replicate, row.latency_ms) for row in arms] == [(0, 1.0), (1, 2.0), (2, 3.0)]
    assert len({row.point_id for row in arms}) == 1


def test_energy_is_measured_where_the_suite_says_so(tmp_path, crew):
    go(tmp_path, suite_of(tmp_path, "energy = true\n", tokens=[4]))
    assert [each.about for each in crew.asked("idle")] == [""]
    assert {each.about for each in crew.asked("energy")} == {"torch-loop", "torch-bmm"}
    assert len(crew.asked("energy")) == 2 * 3
    rows = {row.provider: row for row in records(tmp_path / "run")}
    assert rows["copy"].energy_source is None, "a yardstick has none"


def test_joules_of_a_call_become_joules_per_token(tmp_path, crew):
    joules = iter([800.0, 600.0, 900.0])  # of 100 calls of 4 tokens, of which 60 J would have gone while idle
    crew.cues["torch-bmm", "energy"] = lambda: {"joules": next(joules), "beside": {"watts": {"zeus": 1000.0}}}
    go(tmp_path, suite_of(tmp_path, "energy = true\n", tokens=[4]))
    row = next(row for row in records(tmp_path / "run") if row.provider == "torch-bmm")
    assert (row.energy_source, row.energy_reason, row.energy_idle_w) == ("straw", None, 60.0)
    assert (row.energy_j_per_token_low, row.energy_j_per_token, row.energy_j_per_token_high) == (1.5, 2.0, 2.25)
    assert row.energy_net_j_per_token == 1.85
    assert (row.energy_second_source, row.energy_second_j_per_token) == ("zeus", 2.5)
    assert row.flags == ["energy_noisy", "energy_sources_disagree"]


def test_without_a_counter_there_is_a_reason_and_no_number(tmp_path, crew):
    crew.cues["", "idle"] = {"source": "none", "reason": "no counter here"}
    outcome = go(tmp_path, suite_of(tmp_path, "energy = true\n", tokens=[4]))
    assert outcome.exit_code == 0
    assert crew.asked("energy") == []
    row = next(row for row in records(tmp_path / "run") if row.provider == "torch-bmm")
    assert (row.status, row.energy_source, row.energy_reason) == ("measured", "none", "no counter here")
    carried = [name for name in PERFORMANCE if name.startswith("energy_") and getattr(row, name) is not None]
    assert carried == ["energy_source", "energy_reason"]


def test_windows_are_as_many_and_as_long_as_the_suite_says(tmp_path, crew):
    path = write_suite(tmp_path)
    path.write_text("energy = true\n" + path.read_text().replace(
        "[budget]\n", "[budget]\nenergy_trials = 2\nenergy_window_seconds = 0.5\nenergy_cool_down_seconds = 1.5\n"
    ))  # fmt: skip
    go(tmp_path, load_suite([str(path)]))
    assert len(crew.asked("energy")) == 2 * 2 * len(crew.asked("idle")) > 0
    asked = crew.asked("idle") + crew.asked("energy")
    lengths = {(each.arguments["window_s"], each.arguments["cool_down_s"]) for each in asked}
    assert lengths == {(0.5, 1.5), (0.5, 1.5 + 0.01 / 2)}, "the second trial half a tick later in phase"


@pytest.mark.parametrize(("available", "opened"), [(17_000, [["fp32", "bf16"]]), (15_000, [["fp32"], ["bf16"]])])
def test_a_block_whose_precisions_do_not_fit_together_is_split(tmp_path, crew, available, opened):
    """Its 1,600 weights take 9,600 bytes in both; 60 % of what is available may be weights."""
    suite = suite_of(tmp_path, overrides={"precision": ["fp32", "bf16"]}, tokens=[4])
    crew.cues["", "hello"] = {"available_bytes": available}
    go(tmp_path, suite)
    assert [each.arguments["precisions"] for each in crew.asked("open")] == opened
    rows = records(tmp_path / "run")
    assert len({row.block_id for row in rows}) == len(opened)
    assert sum(row.provider == "copy" for row in rows) == len(opened), "yardsticks stand in every block"


def test_shards_share_the_blocks(tmp_path, crew):
    suite = suite_of(tmp_path, tokens=[4, 8, 16])
    seen = []
    for share in (1, 2):
        run_suite(suite, Options(tmp_path / f"shard{share}", shard=(share, 2)))
        seen.append({row.tokens for row in records(tmp_path / f"shard{share}")})
    assert seen == [{4, 16}, {8}]


def test_progress_is_told(tmp_path, crew):
    told = []
    progress = Progress(
        lambda manifest, done: told.append(("started", done)),
        lambda block: told.append(("block", block.problem.tokens)),
        lambda block, rows: told.append(("done", len(rows))),
    )
    run_suite(suite_of(tmp_path), Options(tmp_path / "run"), progress)
    assert told == [("started", 0), ("block", 4), ("done", 5), ("block", 8), ("done", 5)]


# Workers lost outside a block


def test_a_provider_that_kills_the_worker_while_it_loads_costs_its_own_points(tmp_path, crew):
    crew.cues["torch-bmm", "provider"] = WorkerLost("crashed", "provider: the worker ended with exit code 3")
    outcome = go(tmp_path)
    assert dict(outcome.counts) == {"measured": 2, "unavailable": 2}
    ((name, _, reason),) = outcome.reasons
    assert (name, reason) == ("torch-bmm", "loading it: provider: the worker ended with exit code 3")
    assert manifest(tmp_path)["ceilings"]["copy_gbs"] == 10.0, "the fresh worker is asked"


def test_a_worker_lost_on_the_ceilings_leaves_them_unknown(tmp_path, crew):
    crew.cues["", "ceilings"] = WorkerLost("crashed", "gone")
    assert go(tmp_path).exit_code == 0
    assert manifest(tmp_path)["ceilings"] is None
    assert all(row.limit_ms is None for row in records(tmp_path / "run"))


def test_a_worker_that_does_not_start_is_one_line(tmp_path, crew):
    crew.cues["", "hello"] = WorkerLost("crashed", "hello: the worker ended with exit code 1")
    with pytest.raises(RunError, match=r"^the worker does not start: hello: the worker ended with exit code 1; .*log"):
        go(tmp_path)


def test_a_device_that_is_not_there_is_a_wrong_word(tmp_path, crew):
    crew.cues["", "hello"] = {"status": "unavailable", "reason": "Unavailable: no CUDA device is available"}
    with pytest.raises(ValueError, match=r"^--device cuda: no CUDA device is available$"):
        go(tmp_path, device="cuda")


# Stopped anywhere, and gone on with


class At:
    """Raises at the n-th time."""

    def __init__(self, number, error):
        self.left, self.error = number, error

    def __call__(self, *_, **__):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return {}


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("number", [1, 2])
def test_interrupted_at_any_message_then_resumed_every_point_stands_once(tmp_path, crew, message, number):
    about = {"provider": "torch-bmm", "arm": "torch-bmm", "yardstick": "copy"}.get(message)
    about = about or ("torch-bmm" if message in ("check", "warm", "memory", "burst") else "")
    crew.cues[about, message] = At(number, KeyboardInterrupt())
    outcome = go(tmp_path)
    if message in ("hello", "provider", "ceilings") and number == 2:
        assert outcome.exit_code == 0, "these come once"
    else:
        assert (outcome.interrupted, outcome.exit_code) == (True, 130)
        assert all(worker.ended for worker in crew.workers)
    crew.cues.clear()
    assert go(tmp_path, resume=True).exit_code == 0
    assert {row.status for row in every_point_once(tmp_path)} == {"measured"}
    assert len(written_points(tmp_path / "run")) == len(TOKENS) * PER_BLOCK, "no block is written twice"


def test_what_an_interrupted_run_has_not_reached_is_skipped_with_a_reason(tmp_path, crew):
    crew.cues["torch-bmm", "check"] = At(2, KeyboardInterrupt())
    go(tmp_path)
    assert len(records(tmp_path / "run")) == PER_BLOCK
    found = table(tmp_path)
    assert len(found) == len(TOKENS) * PER_BLOCK
    late = found[found["tokens"] == 8]
    assert set(late["status"]) == {"skipped"}
    assert late["reason"].str.contains("interrupted").all()
    assert late["latency_ms"].isna().all()
    assert manifest(tmp_path)["finished"] == "interrupted"


def test_resuming_measures_only_what_is_missing(tmp_path, crew):
    crew.cues["torch-bmm", "check"] = At(2, KeyboardInterrupt())
    go(tmp_path)
    before = {row.point_id: row for row in records(tmp_path / "run")}
    crew.cues.clear()
    crew.workers.clear()
    outcome = go(tmp_path, resume=True)
    assert dict(outcome.counts) == {"measured": 4}
    assert [each.arguments["problem"]["tokens"] for each in crew.asked("open")] == [8]
    assert crew.asked("ceilings") == [], "those of the first session hold"
    after = {row.point_id: row for row in every_point_once(tmp_path)}
    assert all(after[name] == row for name, row in before.items())
    assert manifest(tmp_path)["sessions"] == 2
    assert manifest(tmp_path)["finished"] == "complete"
    assert len({row.run_id for row in after.values()}) == 1


def test_resuming_a_complete_run_changes_nothing(tmp_path, crew):
    go(tmp_path)
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    assert go(tmp_path, resume=True).exit_code == 0
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before
    assert len(crew.asked("open")) == len(TOKENS)


def test_a_half_written_block_is_repeated_whole_and_stands_once(tmp_path, crew):
    go(tmp_path)
    path = tmp_path / "run" / "journal.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][:40])
    go(tmp_path, resume=True)
    every_point_once(tmp_path)
    assert [each.arguments["problem"]["tokens"] for each in crew.asked("open")] == [4, 8, 8]


def test_a_damaged_journal_is_refused_before_anything_is_measured(tmp_path, crew):
    go(tmp_path)
    path = tmp_path / "run" / "journal.jsonl"
    damaged = path.read_bytes().replace(b"{", b"[", 1)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"journal.jsonl: line 1 is not a record"):
        go(tmp_path, resume=True)
    assert path.read_bytes() == damaged


def test_a_budget_of_seconds_leaves_the_rest_for_resuming(tmp_path, crew, monkeypatch):
    path = write_suite(tmp_path, tokens=TOKENS)
    path.write_text(path.read_text().replace("[budget]\n", "[budget]\nseconds_total = 50.0\n"))
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr("moebench.run.time.monotonic", lambda: float(next(clock)))
    outcome = go(tmp_path, load_suite([str(path)]))
    assert outcome.exit_code == 130
    assert set(table(tmp_path)["status"]) == {"measured", "skipped"}
    assert go(tmp_path, load_suite([str(path)]), resume=True).exit_code == 0
    every_point_once(tmp_path)


def test_a_second_interruption_while_the_table_is_written_loses_nothing(tmp_path, crew, monkeypatch):
    crew.cues["torch-bmm", "check"] = At(2, KeyboardInterrupt())
    with monkeypatch.context() as patch:
        patch.setattr("moebench.run.write_results", At(1, KeyboardInterrupt()))
        outcome = go(tmp_path)
    assert outcome.exit_code == 130
    assert not (tmp_path / "run" / "results.parquet").exists()
    crew.cues.clear()
    assert go(tmp_path, resume=True).exit_code == 0
    every_point_once(tmp_path)


def test_no_table_of_the_session_before_outlives_a_kill(tmp_path, crew, monkeypatch):
    """A report after `kill -9` must read the journal, not the shorter table of the session before."""
    crew.cues["torch-bmm", "check"] = At(2, KeyboardInterrupt())
    go(tmp_path)
    assert (tmp_path / "run" / "results.parquet").exists()
    crew.cues["torch-bmm", "check"] = At(1, SystemExit())
    with pytest.raises(SystemExit):
        go(tmp_path, resume=True)
    assert not (tmp_path / "run" / "results.parquet").exists()
    assert manifest(tmp_path)["finished"] is None


def test_sigterm_stops_a_run_as_ctrl_c_does_and_its_handler_is_put_back(tmp_path, crew):
    before = signal.getsignal(signal.SIGTERM)
    crew.cues["torch-bmm", "check"] = lambda: os.kill(os.getpid(), signal.SIGTERM) or {}
    assert go(tmp_path).exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is before


# What resuming refuses


def resumed_with(tmp_path, suite=None, **options):
    with pytest.raises(ValueError, match="cannot be resumed, since this changed: ") as error:
        go(tmp_path, suite, resume=True, **options)
    assert "\n" not in str(error.value)
    return str(error.value).partition("changed: ")[2]


@pytest.fixture
def stopped(tmp_path, crew):
    crew.cues["torch-bmm", "check"] = At(2, KeyboardInterrupt())
    go(tmp_path)
    crew.cues.clear()
    return (tmp_path / "run" / "journal.jsonl").read_bytes()


def test_resuming_needs_the_same_suite(tmp_path, crew, stopped):
    changed = "the suite file (line 1: 'name = \"tiny\"' then, 'seed = 1' now)"
    assert resumed_with(tmp_path, suite_of(tmp_path, "seed = 1\n")) == changed
    suite_of(tmp_path)
    overridden = load_suite([str(tmp_path / "tiny.toml")], {"tokens": ["4"]})
    assert resumed_with(tmp_path, overridden) == "--set tokens (not given then, '4' now)"
    assert resumed_with(tmp_path, shard=(1, 2)) == "--shard (1/1 then, 1/2 now)"
    assert resumed_with(tmp_path, check_only=True) == "--check-only (not given then, given now)"
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == stopped
    assert go(tmp_path, resume=True).exit_code == 0


def test_resuming_needs_the_same_device(tmp_path, crew, stopped):
    crew.cues["", "hello"] = {"device": "Hay"}
    assert resumed_with(tmp_path) == "the device (Straw then, Hay now)"


def test_resuming_needs_the_same_providers(tmp_path, crew, stopped):
    crew.cues["torch-bmm", "provider"] = {"hash": "other", "version": "straw 2"}
    crew.cues["torch-loop", "provider"] = {"status": "x", "unavailable": "gone"}
    found = resumed_with(tmp_path)
    assert "provider torch-bmm (straw 1 with source" in found
    assert "straw 2 with source other now)" in found
    assert "provider torch-loop (straw 1 with source" in found
    assert "then, unavailable now)" in found


def test_resuming_needs_the_same_provider_file(tmp_path, crew):
    kernel = tmp_path / "kernel.py"
    kernel.write_text("def experts(x, ids, weights, w_gate_up, w_down): ...\n")
    suite = load_suite([str(write_suite(tmp_path))], {"provider": ["torch-loop", f"{kernel}:experts"]})
    crew.cues["torch-loop", "check"] = At(2, KeyboardInterrupt())
    go(tmp_path, suite)
    crew.cues.clear()
    kernel.write_text("# faster\n" + kernel.read_text())
    assert f"provider {kernel}:experts (user with source" in resumed_with(tmp_path, suite)


# A folder that cannot be written any more


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["journal", "manifest", "table"])
def test_a_full_disk_is_one_line_and_what_was_measured_is_kept(tmp_path, crew, monkeypatch, where):
    def fail(patch):
        if where == "table":
            patch.setattr("moebench.run.write_results", no_space)
        else:
            count = {"journal": 3, "manifest": 1}[where]  # the manifest, then the first block, are synced before
            patch.setattr("moebench.journal.os.fsync", At(count, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))

    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(RunError, match=r"run cannot be written any more: No space left on device; .* is kept$"):
            go(tmp_path)
    assert all(worker.ended for worker in crew.workers)
    kept = {"journal": PER_BLOCK, "manifest": 0, "table": 2 * PER_BLOCK}[where]
    assert len(records(tmp_path / "run")) == kept
    crew.workers.clear()
    assert go(tmp_path, resume=True).exit_code == 0
    every_point_once(tmp_path)
    assert len(crew.asked("open")) == len(TOKENS) - kept // PER_BLOCK


def test_two_runs_cannot_share_a_folder(tmp_path, crew):
    with RunDirectory(tmp_path / "run").opened(resume=False):
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"run is being written by another run$"):
                go(tmp_path, resume=resume)
    assert crew.workers == []
    assert go(tmp_path).exit_code == 0


# The words to go on with


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "suite", "quick"], "moebench run suite quick --out 'a b' --resume"),
        (["run", "suite", "quick", "--out", "a b"], "moebench run suite quick --out 'a b' --resume"),
        (["run", "suite", "--out=a b", "--resume"], "moebench run suite '--out=a b' --resume"),
        (["run", "suite", "--provider", "my kernel.py:f"],
         "moebench run suite --provider 'my kernel.py:f' --out 'a b' --resume"),
    ],
)  # fmt: skip
def test_the_resume_command_can_be_typed(words, expected):
    assert resume_command(Options(Path("a b"), command=default_command(words))) == expected


def test_a_point_is_known_by_its_content(tmp_path):
    first, second = (next(iter(suite_of(tmp_path, tokens=[tokens]).blocks("cpu"))) for tokens in (4, 8))
    assert digest(first.points()[0]) != digest(first.points()[1])
    assert digest(first.points()[0]) != digest(second.points()[0])
    again = next(iter(suite_of(tmp_path, tokens=[4]).blocks("cpu")))
    assert digest(first.points()[0]) == digest(again.points()[0])
