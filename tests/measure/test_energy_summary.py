"""What windows say together, from their numbers alone."""

import re
from pathlib import Path

import pytest

from moebench.measure import energy_summary
from moebench.measure.energy_summary import summarise
from moebench.report.columns import FLAGS

IDLE = {
    "source": "nvml", "joules": 300.0, "seconds": 5.0, "calls": 0, "ticked": True, "period_s": 0.1,
    "max_watts": 5000.0, "wrap_missed": False, "jumped": False, "beside": {"watts": {}},
}  # fmt: skip
BUSY = {**IDLE, "joules": 1500.0, "calls": 1000}


def windows(*changes, **shared):
    return [{**BUSY, **shared, **change} for change in changes or ({}, {}, {})]


def beside(**seen):
    return {"beside": {"watts": {}, **seen}}


def test_the_median_trial_counts_and_the_lowest_and_highest_are_kept():
    found = summarise(IDLE, windows({"joules": 1450.0}, {"joules": 1500.0}, {"joules": 1580.0}))
    names = ("gross_j_per_call_low", "gross_j_per_call", "gross_j_per_call_high")
    assert [found[name] for name in names] == [1.45, 1.5, 1.58]
    assert (found["net_j_per_call"], found["idle_w"], found["flags"]) == (1.2, 60.0, [])
    assert (found["source"], found["reason"], found["second_source"]) == ("nvml", None, None)


@pytest.mark.parametrize(("joules", "flags"), [(1640.0, []), (1660.0, ["energy_noisy"])])
def test_trials_that_disagree_are_flagged(joules, flags):
    assert summarise(IDLE, windows({}, {}, {"joules": joules}))["flags"] == flags


def test_net_energy_below_idle_is_kept_and_flagged():
    found = summarise(IDLE, windows(joules=250.0))
    assert found["net_j_per_call"] == pytest.approx(-0.05)
    assert found["flags"] == ["energy_below_idle"]


@pytest.mark.parametrize("change", [{"ticked": False}, {"joules": -3.0}, {"reason": "gone"}, {"wrap_missed": True}])
def test_without_an_idle_window_gross_stands_alone(change):
    found = summarise({**IDLE, **change}, windows())
    assert (found["gross_j_per_call"], found["net_j_per_call"], found["idle_w"]) == (1.5, None, None)
    assert found["flags"] == ["energy_idle_unknown"]


@pytest.mark.parametrize(
    ("change", "flags", "reason"),
    [
        ({"ticked": False}, ["energy_counter_stuck"], "did not tick"),
        ({"joules": -7.0}, ["energy_counter_reset"], "says -1.4 W"),
        ({"joules": 0.0}, ["energy_counter_reset"], "says 0 W"),
        ({"joules": 26_000.0}, ["energy_counter_reset"], "says 5200 W"),
        ({"jumped": True}, ["energy_counter_reset"], "it jumped"),
        ({"wrap_missed": True, "jumped": True}, ["energy_wrap_missed"], "may have wrapped unseen"),
        ({"reason": "NVML: gone"}, [], "NVML: gone"),
    ],
)
def test_one_window_that_counts_nothing_leaves_a_reason_and_no_number(change, flags, reason):
    found = summarise(IDLE, windows({}, change, {}))
    assert found.keys() == {"source", "reason", "flags"}
    assert found["source"] == "nvml"
    assert found["flags"] == flags
    assert reason in found["reason"]


def test_no_counter_is_the_source_none_and_its_reason():
    none = {"source": "none", "reason": "no RAPL"}
    assert summarise(none, []) == {"source": "none", "reason": "no RAPL", "flags": []}
    assert summarise(IDLE, [])["reason"] == "no window was measured"


@pytest.mark.parametrize(("watts", "flags"), [(340.0, []), (350.0, ["energy_sources_disagree"]), (250.0, None)])
def test_a_second_source_stands_beside_the_counter(watts, flags):
    found = summarise(IDLE, windows({}, {}, {}, **beside(watts={"nvml_power": watts, "zeus": 300.0})))
    assert (found["second_source"], found["second_j_per_call"]) == ("nvml_power", pytest.approx(watts * 5 / 1000))
    assert found["gross_j_per_call"] == 1.5, "and changes nothing"
    assert found["flags"] == (["energy_sources_disagree"] if flags is None else flags)


def test_any_second_source_may_disagree():
    found = summarise(IDLE, windows({}, {}, {}, **beside(watts={"nvml_power": 300.0, "zeus": 561.0})))
    assert (found["second_source"], found["flags"]) == ("nvml_power", ["energy_sources_disagree"])


def test_a_second_source_that_misses_a_window_is_left_out():
    one = beside(watts={"nvml_power": 300.0, "zeus": 300.0})
    other = beside(watts={"zeus": 300.0})
    assert summarise(IDLE, windows(one, other, one))["second_source"] == "zeus"


def test_what_the_gpu_went_through_is_flagged_each_once():
    hot = beside(temperature_c=[61, 70], throttle_reasons=["sw_power_cap", "hw_thermal"], other_processes=2)
    cool = beside(temperature_c=[50, 70], throttle_reasons=["sw_power_cap"], other_processes=0)
    assert summarise(IDLE, windows(hot, cool, cool))["flags"] == [
        "energy_shared_gpu", "energy_throttled:hw_thermal", "energy_throttled:sw_power_cap", "energy_temperatures_apart"
    ]  # fmt: skip
    warm = beside(temperature_c=[60, None], throttle_reasons=[], other_processes=None)
    assert summarise(IDLE, windows(warm, cool | beside(temperature_c=[50, 70]), warm))["flags"] == []
    assert summarise(IDLE, windows(beside(temperature_c=[None, None])))["flags"] == []


def test_every_flag_is_explained_in_the_report_and_in_the_documentation():
    raised = set(re.findall(r'"(energy_[a-z_]+)[":]', Path(energy_summary.__file__).read_text()))
    assert raised == {name for name in FLAGS if name.startswith("energy_")}
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    assert all(re.search(rf"\| `{name}[`:]", page) for name in raised)
