"""How a row says its time was taken: timer, cache, outliers, the machine's state; what a suite asks of them."""

import pytest
from pipeline.tiny import records, write_suite

from moebench.options import Options
from moebench.run import run_suite
from moebench.suite import SuiteError, load_suite


def go(tmp_path, name="run", head=""):
    """The rows of a run of one block, two arms and three yardsticks."""
    path = write_suite(tmp_path)
    path.write_text(head + path.read_text())
    run_suite(load_suite([str(path)]), Options(tmp_path / name))
    return records(tmp_path / name)


def test_what_fits_the_cache_is_flagged_and_not_held_against_memorys_speed(tmp_path, crew):
    crew.cues["torch-bmm", "warm"] = {"cache": "hot"}
    for row in go(tmp_path):
        fits = row.provider == "torch-bmm"
        assert (row.cache, row.flags) == (("hot", ["cache_resident"]) if fits else ("cold", []))
        assert row.limit_ms is None or (row.limit_fraction is None) == fits


def test_a_cold_row_that_is_faster_than_the_ceilings_allow_is_flagged(tmp_path, crew):
    """A quarter faster than the straw's ceilings may be explained, and more may not."""
    limit_ms = next(row.limit_ms for row in go(tmp_path) if row.provider == "torch-bmm")
    for name, latency_ms in (("within", limit_ms / 1.24), ("beyond", limit_ms / 1.26)):
        crew.cues["torch-bmm", "burst"] = {"device_ms": [latency_ms] * 10, "wall_ms": [latency_ms + 1] * 10}
        go(tmp_path, name)
    flags = {name: {row.provider: row.flags for row in records(tmp_path / name) if row.tokens == 4}
             for name in ("within", "beyond")}  # fmt: skip
    assert flags["within"]["torch-bmm"] == flags["beyond"]["torch-loop"] == []
    assert flags["beyond"]["torch-bmm"] == ["faster_than_ceiling"]
    crew.cues["torch-bmm", "warm"] = {"cache": "hot"}
    flagged = [row for row in go(tmp_path, "hot") if "faster_than_ceiling" in row.flags]
    assert flagged == [], "in the cache memory's ceiling is none"


def test_ceilings_that_the_blocks_own_yardsticks_surpass_suspect_nobody(tmp_path, crew):
    """As where the ceilings were measured while something else ran: the row is held against what was seen beside it."""
    limit_ms = next(row.limit_ms for row in go(tmp_path) if row.provider == "torch-bmm")
    fast = {"device_ms": [limit_ms / 2] * 10, "wall_ms": [1.0] * 10}
    flags = {}
    for copied_gbs in (12.0, 30.0):
        crew.cues["torch-bmm", "burst"] = fast
        best_ms = 1e6 / copied_gbs / 1e6  # the straw's yardsticks move 1 MB
        crew.cues["copy", "burst"] = {"device_ms": [best_ms, *[9.0] * 9], "wall_ms": [9.0] * 10}
        row = next(row for row in go(tmp_path, f"at{copied_gbs}") if row.provider == "torch-bmm")
        assert row.limit_fraction == pytest.approx(2.0), "the column keeps to the ceilings of the run"
        flags[copied_gbs] = row.flags
    assert flags == {12.0: ["faster_than_ceiling"], 30.0: []}


def test_outliers_both_clocks_and_the_reason_of_the_timer_stand_in_the_row(tmp_path, crew):
    crew.cues["torch-bmm", "burst"] = {"device_ms": [1.0] * 9 + [5.0], "wall_ms": [2.0] * 10}
    crew.cues["torch-bmm", "warm"] = {"why": "no CUDA graph: it waits", "settled": False}
    row = next(row for row in go(tmp_path) if row.provider == "torch-bmm")
    assert row.outlier_samples == [k for k, value in enumerate(row.samples_ms) if value == 5.0] != []
    assert len(row.samples_ms) == len(row.wall_samples_ms) == len(row.sample_round)
    assert (row.latency_ms, row.wall_ms, row.timer_reason) == (1.0, 2.0, "no CUDA graph: it waits")
    assert row.flags == ["not_settled"]


def test_the_state_of_the_machine_stands_in_every_timed_row_and_an_arms_own_in_its_row(tmp_path, crew):
    block = {"cpu_mhz": 2000.0, "load1": 1.5, "steal_share": 0.0, "other_cores": 0.25, "sm_mhz": 900.0, "seconds": 3.0}

    def state_end():
        index = next(each.arguments["index"] for each in crew.asked("arm") if each.about == "torch-bmm")
        own = {"sm_mhz": 1500.0, "memory_mhz": 2600.0, "temperature_c": 60.0, "power_w": 300.0}
        arm = {"index": index, "state": own, "flags": ["throttled:sw_power_cap"]}
        return {"state": block, "flags": [], "arms": [arm]}

    crew.cues["", "state_end"] = state_end
    for row in go(tmp_path):
        assert (row.cpu_mhz, row.load1, row.steal_share, row.other_cores) == (2000.0, 1.5, 0.0, 0.25)
        own = row.provider == "torch-bmm"
        found = (row.sm_mhz, row.memory_mhz, row.temperature_c, row.power_w, row.flags)
        assert found == (
            (1500.0, 2600.0, 60.0, 300.0, ["throttled:sw_power_cap"]) if own else (900.0, None, None, None, [])
        )


@pytest.mark.parametrize(
    ("head", "asked"),
    [("", ("auto", "cold")), ('timer = "cuda_events"\ncache = "hot"\n', ("cuda_events", "hot"))],
)
def test_what_the_suite_asks_of_timer_and_cache_reaches_the_worker(tmp_path, crew, head, asked):
    crew.cues["torch-bmm", "warm"] = {"cache": "hot"}
    rows = go(tmp_path, head=head)
    assert {(each.arguments["timer"], each.arguments["cache"]) for each in crew.asked("warm")} == {asked}
    assert {row.provider for row in rows if row.flags} == ({"torch-bmm"} if asked[1] == "cold" else set())


@pytest.mark.parametrize(("key", "value"), [("timer", "'wall'"), ("cache", "'warm'"), ("cache", "true")])
def test_another_word_is_refused_with_those_that_are_allowed(tmp_path, key, value):
    path = write_suite(tmp_path)
    path.write_text(f"{key} = {value}\n" + path.read_text())
    with pytest.raises(SuiteError, match=f"{key}: found .*(cuda_graph|cold)"):
        load_suite([str(path)])


@pytest.mark.parametrize(("key", "value"), [("timer", "cuda_events"), ("cache", "hot")])
def test_suites_that_run_as_one_have_one_timer_and_one_cache(tmp_path, key, value):
    (tmp_path / "other").mkdir()
    other = write_suite(tmp_path / "other")
    other.write_text(f'{key} = "{value}"\n' + other.read_text())
    with pytest.raises(SuiteError, match=f"tiny.toml and .*other/tiny.toml: {key}: differ"):
        load_suite([str(write_suite(tmp_path)), str(other)])


def test_a_run_whose_time_is_up_begins_no_further_block_and_says_so(tmp_path, crew, monkeypatch):
    path = write_suite(tmp_path, tokens=[4, 8, 16])
    path.write_text(path.read_text().replace("[budget]\n", "[budget]\nseconds_total = 50.0\n"))
    now = [0.0]
    monkeypatch.setattr("moebench.run.time.monotonic", lambda: now[0])
    crew.cues["", "state_end"] = lambda: now.__setitem__(0, now[0] + 30.0) or {}
    outcome = run_suite(load_suite([str(path)]), Options(tmp_path / "run"))
    assert [each.arguments["problem"]["tokens"] for each in crew.asked("open")] == [4, 8]
    assert outcome.exit_code == 130
