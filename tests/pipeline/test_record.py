"""Record: what was not measured carries no number, and every gap has its reason."""

import json

import pytest
from pipeline.test_journal import IDENTITY, record
from pydantic import ValidationError

from moebench.record import COLUMNS, FAULTS, GOOD, PERFORMANCE, ROUTING_COLUMNS, STATUSES, Record

MEASURED = {"status": "measured", "timer": "cpu_wall", "latency_ms": 1.0, "samples_ms": [1.0]}
VALUES = {
    "timer": "cpu_wall",
    "timer_reason": "no graph",
    "cache": "cold",
    "wall_samples_ms": [1.0],
    "outlier_samples": [0],
    "samples_ms": [1.0],
    "sample_round": [0],
    "energy_source": "none",
    "energy_reason": "no counter",
    "energy_second_source": "zeus",
    "peak_memory_bytes": 1,
}
UNMEASURED = [status for status in STATUSES if status != "measured"]


def make(status, **more):
    words = {"checked_on": "T4"} if status == "verified" else {"reason": "because"}
    return Record(**{**IDENTITY, "point_id": "p", "status": status, **words, **more})


@pytest.mark.parametrize("status", UNMEASURED)
def test_no_performance_number_without_a_measurement(status):
    make(status)
    for name in PERFORMANCE:
        with pytest.raises(ValidationError, match=f"cannot carry {name}"):
            make(status, **{name: VALUES.get(name, 1.0)})


def test_every_number_is_a_performance_number_a_fact_of_the_routing_or_an_error():
    """A new column must be put on one side or the other."""
    known = {"executed_flops", "rel_error", "max_error", "fidelity_error", "drop_rate", "load_max_over_mean"}
    known |= {"capacity_factor", *ROUTING_COLUMNS}
    numbers = {name for name, info in Record.model_fields.items() if "float" in str(info.annotation)}
    assert numbers - known <= set(PERFORMANCE)
    assert set(PERFORMANCE) <= set(COLUMNS)


@pytest.mark.parametrize("name", ["timer", "latency_ms", "samples_ms"])
def test_a_measurement_shows_its_samples(name):
    Record(**IDENTITY, point_id="p", **MEASURED)
    with pytest.raises(ValidationError, match=f"needs {name}"):
        Record(**IDENTITY, point_id="p", **{**MEASURED, name: None})


@pytest.mark.parametrize("status", [status for status in UNMEASURED if status not in GOOD])
@pytest.mark.parametrize("reason", [None, ""])
def test_every_gap_has_a_reason(status, reason):
    with pytest.raises(ValidationError, match="needs a reason"):
        make(status, reason=reason)


def test_what_is_verified_says_on_which_shape():
    with pytest.raises(ValidationError, match="needs checked_on"):
        make("verified", checked_on=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["latency_ms", "rel_error", "s_mfu", "samples_ms"])
def test_no_record_holds_what_is_no_number(name, value):
    with pytest.raises(ValidationError, match="finite"):
        Record(**IDENTITY, point_id="p", **{**MEASURED, name: [value] if name == "samples_ms" else value})


def test_unknown_statuses_and_columns_are_refused():
    with pytest.raises(ValidationError, match="status"):
        make("fine")
    with pytest.raises(ValidationError, match="latency_s"):
        make("failed", latency_s=1.0)


def test_a_record_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        record("p").status = "measured"


def test_a_null_is_written_as_null():
    row = json.loads(record("p").model_dump_json())
    assert list(row) == list(COLUMNS)
    assert [name for name in PERFORMANCE if row[name] is not None] == []


def test_each_status_is_good_a_fault_or_an_answer():
    assert not set(GOOD) & set(FAULTS)
    assert {*STATUSES} - {*GOOD, *FAULTS} == {"unavailable", "not_applicable", "skipped"}
