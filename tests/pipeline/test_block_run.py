"""One block, with workers of straw: the order of things, when sampling stops, and what a fault costs."""

import pytest
from pipeline.stand_in import Crew

from moebench.block_run import MAX_BURST, MIN_ROUNDS, NOTHING_TO_COMPARE, BlockRun, Settings
from moebench.catalogue.spec import LayerSpec, RouterSpec
from moebench.failures import RunError
from moebench.point import Block, Problem, Variant
from moebench.remote import WorkerLost
from moebench.suite import Budget

LAYER = LayerSpec(16, 8, 4, 2)
ARMS = ("torch-loop", "torch-bmm", "torch-grouped")
YARDSTICKS = ("copy", "read", "gemm")
EVERYONE = {*ARMS, *YARDSTICKS}
STEPS = ("arm", "check", "warm", "memory", "burst")


def problem(**changes):
    return Problem(**{"model": "custom", "layer": LAYER, "tokens": 4, "traffic": "uniform", **changes})


def block_of(*providers, precisions=("fp32",), **changes):
    variants = [Variant(provider, precision) for provider in providers for precision in precisions]
    return Block(problem(**changes), tuple(variants))


def run(crew, block=None, start=None, **settings):
    budget = Budget(**settings.pop("budget", {}))
    chosen = Settings(**{"device_kind": "cpu", "budget": budget, "unavailable": {}, **settings})
    running = BlockRun(block or block_of(*ARMS), chosen, crew.start(), start or crew.start)
    return {entry.variant.provider: entry for entry in running.run()}


def steps(worker):
    return [asked.do for asked in worker.asked]


def rounds(worker):
    """Who was sampled, round by round: a name that comes again begins a round."""
    found = [[]]
    for asked in worker.messages("burst"):
        if asked.about in found[-1]:
            found.append([])
        found[-1].append(asked.about)
    return found


def noisy(low, high):
    """A burst whose samples never agree."""
    values = iter([low, high] * 10_000)
    return lambda: {"device_ms": [next(values) for _ in range(2)], "wall_ms": [1.0, 1.0]}


# The order of things


def test_all_are_built_then_all_checked_then_all_warmed_and_only_then_sampled():
    crew = Crew()
    entries = run(crew)
    order = steps(crew.workers[0])
    assert order[0] == "open"
    assert list(dict.fromkeys(order)) == [
        "open", "arm", "yardstick", "check", "warm", "memory", "state_begin", "burst", "state_end", "recheck"
    ]  # fmt: skip
    phases = [do for do in order if do not in ("open", "burst", "state_begin", "state_end")]
    assert phases == ["arm"] * 3 + ["yardstick"] * 3 + ["check"] * 6 + ["warm"] * 6 + ["memory"] * 3 + ["recheck"] * 3
    assert all(entry.live and entry.samples_ms for entry in entries.values())
    assert set(entries) == EVERYONE


def test_an_arm_that_was_timed_at_other_work_than_was_checked_loses_its_numbers():
    found = {"wrong": "its output had been kept", "flags": []}
    crew = Crew({("torch-bmm", "recheck"): found, ("torch-loop", "recheck"): {"flags": ["reuses_output"]}})
    entries = run(crew)
    assert (entries["torch-bmm"].status, entries["torch-bmm"].reason) == ("inaccurate", "its output had been kept")
    assert entries["torch-loop"].live
    assert entries["torch-loop"].flags == ["reuses_output"]
    assert {each.about for each in crew.asked("recheck")} == {"torch-loop", "torch-bmm", "torch-grouped"}
    assert all(each.arguments["latency_ms"] > 0 for each in crew.asked("recheck"))


def test_modes_that_a_provider_changed_are_flags_of_its_row_each_once():
    crew = Crew({("torch-bmm", "burst"): {"changed_modes": ["threads", "tf32"]}})
    entries = run(crew)
    assert entries["torch-bmm"].flags == ["changed_threads", "changed_tf32"]
    assert entries["torch-loop"].flags == []


def test_yardsticks_stand_in_every_block_the_gemm_once_for_each_precision():
    crew = Crew()
    run(crew, block_of("torch-loop", "dense-ffn", precisions=("fp32", "bf16")))
    asked = [(each.about, each.arguments["precision"]) for each in crew.asked("yardstick")]
    assert asked == [("copy", "fp32"), ("read", "fp32"), ("gemm", "fp32"), ("gemm", "bf16")]
    assert crew.asked("open")[0].arguments["precisions"] == ["fp32", "bf16"]
    memory = {each.about for each in crew.asked("memory")}
    assert memory == {"torch-loop"}  # of arms only


def test_roles():
    entries = run(Crew(), block_of("torch-loop", "dense-ffn"))
    assert {name: entry.role for name, entry in entries.items()} == {
        "torch-loop": "arm", "dense-ffn": "yardstick", "copy": "yardstick", "read": "yardstick", "gemm": "yardstick"
    }  # fmt: skip


def test_every_round_has_everyone_once_in_an_order_that_changes():
    crew = Crew()
    run(crew, budget={"min_samples": 100})
    found = rounds(crew.workers[0])
    assert len(found) == 10
    assert all(set(names) == EVERYONE and len(names) == len(EVERYONE) for names in found)
    assert len({tuple(names) for names in found}) > 5


def test_the_shuffle_is_the_same_again_and_another_for_another_problem():
    def order(**changes):
        crew = Crew()
        run(crew, block_of(*ARMS, **changes))
        return rounds(crew.workers[0])

    assert order() == order()
    assert order() != order(tokens=5)


def test_bursts_go_on_where_the_last_one_ended():
    crew = Crew()
    run(crew)
    starts = [each.arguments["start"] for each in crew.asked("burst") if each.about == "torch-bmm"]
    assert starts == [MAX_BURST * number for number in range(MIN_ROUNDS)]


def test_energy_is_asked_for_arms_and_only_when_the_suite_wants_it():
    crew = Crew()
    run(crew)
    assert crew.asked("energy") == crew.asked("idle") == []
    crew = Crew()
    entries = run(crew, energy=True)
    order = steps(crew.workers[0])
    assert order[-10:] == ["idle"] + ["energy"] * 9, "one idle window stands for the block"
    assert entries["torch-bmm"].energy["gross_j_per_call"] == 3.0
    longest = max(each.deadline_s for each in crew.asked("burst"))
    assert all(each.deadline_s > longest + 15.0 for each in crew.asked("idle") + crew.asked("energy"))


def test_energy_windows_come_in_shuffled_rounds():
    """Whatever drifts over the minutes they take then hits every arm alike."""
    crew = Crew()
    run(crew, energy=True, budget={"energy_trials": 20})
    asked = [each.about for each in crew.asked("energy")]
    found = [tuple(asked[first : first + 3]) for first in range(0, 60, 3)]
    assert all(set(names) == set(ARMS) for names in found)
    assert len(set(found)) > 3


@pytest.mark.parametrize("status", ["crashed", "timeout", "out_of_memory"])
def test_who_dies_in_an_energy_window_is_lost_and_the_others_begin_anew(status):
    windows = iter([{}, {}])
    crew = Crew({("torch-bmm", "energy"): lambda: next(windows, WorkerLost(status, "energy: gone"))})
    entries = run(crew, energy=True)
    assert (entries["torch-bmm"].status, entries["torch-bmm"].reason) == (status, "energy: gone")
    assert len(crew.workers) == 2
    again = crew.workers[1]
    assert len(again.messages("idle")) == 1
    assert [each.about for each in again.messages("energy")].count("torch-loop") == 3
    assert all(entries[name].energy["gross_j_per_call"] == 3.0 for name in ("torch-loop", "torch-grouped"))
    assert set(entries["torch-loop"].samples_ms) == {2.0}


def test_an_idle_window_that_raises_costs_net_energy_and_no_point():
    crew = Crew({("", "idle"): {"status": "failed", "reason": "KeyError: no"}})
    entries = run(crew, energy=True)
    assert all(entry.live for entry in entries.values())
    found = entries["torch-bmm"].energy
    assert (found["source"], found["gross_j_per_call"], found["net_j_per_call"]) == ("straw", 3.0, None)
    assert found["flags"] == ["energy_idle_unknown"]


def test_windows_of_an_arm_differ_in_phase():
    crew = Crew()
    run(crew, energy=True, budget={"energy_cool_down_seconds": 1.0})
    rests = [each.arguments["cool_down_s"] for each in crew.asked("energy") if each.about == "torch-bmm"]
    assert rests == pytest.approx([1.0, 1.0 + 0.01 / 3, 1.0 + 0.02 / 3], abs=1e-9)


def test_a_device_that_breaks_in_the_idle_window_costs_the_last_who_ran():
    once = iter([{"status": "failed", "reason": "CUDA error: gone", "fatal": True}])
    entries = run(Crew({("", "idle"): lambda: next(once, {})}), energy=True)
    assert sum(entry.status == "crashed" for entry in entries.values()) == 1
    assert sum("gross_j_per_call" in entry.energy for entry in entries.values()) == len(ARMS) - 1


# When sampling stops


def test_agreeing_samples_stop_after_the_fewest_rounds():
    """Ten samples are there after one round; the interval of a ratio needs six."""
    entries = run(Crew())
    assert {max(entry.rounds) + 1 for entry in entries.values()} == {MIN_ROUNDS}
    assert entries["copy"].rounds == [number for number in range(MIN_ROUNDS) for _ in range(MAX_BURST)]
    assert entries["copy"].flags == []


def test_samples_go_on_until_there_are_as_many_as_the_suite_asks_for():
    entries = run(Crew(), budget={"min_samples": 70})
    assert {len(entry.samples_ms) for entry in entries.values()} == {70}


def test_disagreeing_samples_go_on_until_the_time_is_up_and_say_so():
    crew = Crew({("torch-bmm", "burst"): noisy(1.0, 3.0)})
    entries = run(crew, budget={"seconds_per_point": 0.5})
    assert len(entries["torch-bmm"].samples_ms) == 500  # of one millisecond each
    assert entries["torch-bmm"].flags == ["wide_interval"]
    assert len(entries["torch-loop"].samples_ms) == MIN_ROUNDS * MAX_BURST
    assert entries["torch-loop"].flags == []


@pytest.mark.parametrize(("estimate_ms", "count"), [(0.001, 10), (1.0, 10), (5.0, 4), (15.0, 1), (300.0, 1)])
def test_a_burst_is_short(estimate_ms, count):
    crew = Crew({("torch-loop", "warm"): {"estimate_ms": estimate_ms}})
    run(crew)
    assert {each.arguments["count"] for each in crew.asked("burst") if each.about == "torch-loop"} == {count}


def test_a_call_of_half_a_second_stops_at_five_samples_and_is_flagged():
    slow = {("torch-loop", "warm"): {"estimate_ms": 600.0}}
    slow["torch-loop", "burst"] = {"device_ms": [600.0], "wall_ms": [600.0]}
    entries = run(Crew(slow), budget={"seconds_per_point": 60.0})
    assert len(entries["torch-loop"].samples_ms) == 5
    assert entries["torch-loop"].flags == ["few_samples"]


def test_one_stalled_burst_is_not_yet_out_of_time():
    stalls = iter([400.0] + [1.0] * 1000)

    def burst():
        took = next(stalls)
        return {"device_ms": [took], "wall_ms": [took]}

    entries = run(Crew({("torch-loop", "burst"): burst}), budget={"seconds_per_point": 0.2})
    assert len(entries["torch-loop"].samples_ms) == 5
    slow = Crew({("torch-loop", "burst"): {"device_ms": [700.0], "wall_ms": [700.0]}})
    entries = run(slow, budget={"seconds_per_point": 0.2})
    assert len(entries["torch-loop"].samples_ms) == 1
    assert entries["torch-loop"].flags == ["few_samples", "wide_interval"]


def test_deadlines_grow_with_the_layer_and_the_call_but_not_for_tiny_ones():
    crew = Crew({("torch-bmm", "warm"): {"estimate_ms": 1000.0}})
    run(crew, budget={"deadline_seconds": 5.0})
    deadlines = {each.about: each.deadline_s for each in crew.asked("burst")}
    assert 5.0 <= deadlines["torch-loop"] < 5.5
    assert deadlines["torch-bmm"] == pytest.approx(5.0 + 10 * MAX_BURST, abs=0.5)
    wide = LayerSpec(4096, 4096, 64, 2)
    crew = Crew()
    run(crew, block_of("torch-loop", layer=wide), budget={"deadline_seconds": 5.0})
    assert crew.asked("open")[0].deadline_s > 5.0 + 60


# What a fault costs


def test_what_did_not_fit_beside_others_may_fit_alone_and_its_reason_says_so():
    full = {"status": "out_of_memory", "reason": "OutOfMemoryError: why"}
    entries = run(Crew({("torch-bmm", "check"): full}))
    alone = "(beside 2 other arms; --provider torch-bmm tries it alone)"
    assert entries["torch-bmm"].reason == f"OutOfMemoryError: why {alone}"
    entries = run(Crew({("torch-bmm", "check"): full}), block_of("torch-bmm"))
    assert entries["torch-bmm"].reason == "OutOfMemoryError: why"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("status", ["failed", "out_of_memory"])
def test_what_raises_costs_its_own_point(step, status):
    crew = Crew({("torch-bmm", step): {"status": status, "reason": "ValueError: no"}})
    entries = run(crew)
    assert entries["torch-bmm"].status == status
    assert entries["torch-bmm"].reason.startswith("ValueError: no")
    assert len(crew.workers) == 1
    others = [entry for name, entry in entries.items() if name != "torch-bmm"]
    assert all(entry.live and len(entry.samples_ms) == MIN_ROUNDS * MAX_BURST for entry in others)
    asked = [each.do for each in crew.workers[0].asked if each.about == "torch-bmm"]
    assert [do for do in asked if do != "drop"][-1] == step, "it is left alone afterwards"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("status", ["crashed", "timeout", "out_of_memory"])
def test_who_kills_the_worker_costs_its_own_point(step, status):
    crew = Crew({("torch-bmm", step): WorkerLost(status, f"{step}: gone")})
    entries = run(crew)
    assert (entries["torch-bmm"].status, entries["torch-bmm"].reason) == (status, f"{step}: gone")
    assert len(crew.workers) == 2
    assert crew.workers[0].ended
    rebuilt = {each.about for do in ("arm", "yardstick") for each in crew.workers[1].messages(do)}
    assert rebuilt == EVERYONE - {"torch-bmm"}
    for name in EVERYONE - {"torch-bmm"}:
        assert entries[name].live
        assert set(entries[name].samples_ms) == {2.0}, "samples of the dead worker are discarded"
        assert entries[name].rounds == [number for number in range(MIN_ROUNDS) for _ in range(MAX_BURST)]


def test_samples_before_a_late_death_are_discarded():
    bursts = iter([{}, {}, {}])

    def third_time():
        return next(bursts, WorkerLost("crashed", "burst: gone"))

    crew = Crew({("torch-bmm", "burst"): third_time})
    entries = run(crew)
    assert len(crew.workers[0].messages("burst")) > 3 * (len(EVERYONE) - 1)
    assert entries["torch-bmm"].status == "crashed"
    assert all(set(entries[name].samples_ms) == {2.0} for name in EVERYONE - {"torch-bmm"})


def test_who_has_passed_the_check_is_not_checked_again_after_a_restart():
    crew = Crew({("torch-bmm", "warm"): WorkerLost("crashed", "gone")})
    run(crew)
    assert crew.workers[1].messages("check") == []


def test_an_error_that_breaks_the_device_costs_its_own_point_and_a_fresh_worker():
    crew = Crew({("torch-bmm", "burst"): {"status": "failed", "reason": "CUDA error: illegal address", "fatal": True}})
    entries = run(crew)
    assert len(crew.workers) == 2
    assert (entries["torch-bmm"].status, entries["torch-bmm"].reason) == (
        "crashed",
        "burst: CUDA error: illegal address",
    )
    assert all(entries[name].samples_ms for name in EVERYONE - {"torch-bmm"})


def test_everyone_may_die_in_turn():
    cues = {(name, step): WorkerLost("crashed", "gone") for name, step in zip(ARMS, STEPS, strict=False)}
    cues["copy", "yardstick"] = WorkerLost("crashed", "gone")
    crew = Crew(cues)
    entries = run(crew)
    assert [name for name, entry in entries.items() if entry.live] == []
    assert {name for name, entry in entries.items() if entry.status == "crashed"} == {*ARMS, "copy"}
    assert len(crew.workers) == 5
    skipped = [entry.reason for entry in entries.values() if entry.status == "skipped"]
    assert skipped == [NOTHING_TO_COMPARE] * 2


@pytest.mark.parametrize("step", ["state_begin", "state_end"])
def test_a_death_between_bursts_costs_one_point(step):
    once = iter([WorkerLost("crashed", "gone")])
    entries = run(Crew({("", step): lambda: next(once, {})}))
    assert sum(entry.status == "crashed" for entry in entries.values()) == 1
    assert sum(entry.live for entry in entries.values()) == len(EVERYONE) - 1


@pytest.mark.parametrize("cue", [WorkerLost("out_of_memory", "why"), {"status": "out_of_memory", "reason": "why"}])
def test_what_cannot_be_built_takes_the_whole_block(cue):
    crew = Crew({("", "open"): cue})
    entries = run(crew)
    assert {(entry.status, entry.reason) for entry in entries.values()} == {("out_of_memory", "why")}
    assert {do for worker in crew.workers for do in steps(worker)} == {"open"}


def test_a_worker_that_does_not_start_again_ends_the_run():
    def broken():
        raise RunError("the worker does not start")

    with pytest.raises(RunError):
        run(Crew({("torch-bmm", "arm"): WorkerLost("crashed", "gone")}), start=broken)


# Wrong answers, refusals, checks without timing


def test_a_wrong_answer_is_inaccurate_keeps_its_errors_and_is_never_timed():
    crew = Crew({("torch-bmm", "check"): {"rel_error": 0.5, "max_error": 2.0, "wrong": "off by 0.5"}})
    entry = run(crew)["torch-bmm"]
    assert (entry.status, entry.reason) == ("inaccurate", "off by 0.5")
    assert entry.verdict["rel_error"] == 0.5
    asked = [each.do for each in crew.workers[0].asked if each.about == "torch-bmm"]
    assert asked == ["arm", "check", "drop"]


def test_a_yardstick_can_be_wrong_too():
    entries = run(Crew({("copy", "check"): {"wrong": "the copy differs"}}))
    assert entries["copy"].status == "inaccurate"
    assert entries["read"].live


def test_the_unavailable_never_reach_the_worker():
    crew = Crew()
    entries = run(crew, unavailable={"torch-bmm": "its library is missing"})
    assert (entries["torch-bmm"].status, entries["torch-bmm"].reason) == ("unavailable", "its library is missing")
    assert "torch-bmm" not in {each.about for each in crew.workers[0].asked}


def test_what_no_provider_can_run_never_reaches_the_worker():
    crew = Crew()
    layer = LayerSpec(16, 8, 4, 2, router=RouterSpec("soft_moe"))
    entries = run(crew, block_of("torch-loop", layer=layer))
    assert entries["torch-loop"].status == "not_applicable"
    assert "soft_moe" in entries["torch-loop"].reason
    assert crew.workers[0].asked == []
    assert {entries[name].status for name in YARDSTICKS} == {"skipped"}


def test_yardsticks_are_not_run_for_nobody():
    crew = Crew()
    entries = run(crew, block_of("torch-bmm"), unavailable={"torch-bmm": "missing"})
    assert crew.workers[0].asked == []
    assert {entries[name].reason for name in YARDSTICKS} == {NOTHING_TO_COMPARE}


def test_a_provider_may_decline():
    crew = Crew({("torch-bmm", "arm"): {"not_applicable": "forward only"}})
    entries = run(crew)
    assert (entries["torch-bmm"].status, entries["torch-bmm"].reason) == ("not_applicable", "forward only")
    assert {each.about for each in crew.asked("check")} == EVERYONE - {"torch-bmm"}


def test_what_runs_in_an_interpreter_is_checked_and_never_timed():
    crew = Crew({("torch-bmm", "arm"): {"timed": False}})
    entry = run(crew)["torch-bmm"]
    assert entry.live
    assert entry.samples_ms == []
    asked = [each.do for each in crew.workers[0].asked if each.about == "torch-bmm"]
    assert asked == ["arm", "check"]


def test_when_nothing_is_timed_the_yardsticks_are_not_either():
    crew = Crew({("torch-bmm", "arm"): {"timed": False}})
    entries = run(crew, block_of("torch-bmm"))
    assert entries["torch-bmm"].live
    assert crew.asked("burst") == []
    assert {entries[name].status for name in YARDSTICKS} == {"skipped"}


def test_check_only_checks_and_times_nothing():
    crew = Crew({("torch-grouped", "check"): {"wrong": "off"}})
    entries = run(crew, check_only=True)
    assert set(entries) == set(ARMS)
    assert set(steps(crew.workers[0])) == {"open", "arm", "check", "drop"}
    assert entries["torch-grouped"].status == "inaccurate"
    assert entries["torch-loop"].live


def test_flags_of_samples_that_were_discarded_go_with_them():
    warmths = iter([{"settled": False}, {"settled": True}])
    cues = {("torch-loop", "warm"): lambda: next(warmths), ("torch-bmm", "burst"): WorkerLost("crashed", "gone")}
    cues["torch-loop", "memory"] = {"changed_modes": ["threads"]}
    entries = run(Crew(cues))
    assert entries["torch-bmm"].status == "crashed"
    assert entries["torch-loop"].flags == ["changed_threads"]
