"""Yardsticks and error norms: each has an oracle of its own, and each check can fail."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moebench.measure.errors import (
    BACKWARD_FACTOR,
    EAGER_FACTOR,
    MAX_TOLERANCE,
    NO_ERROR,
    REL_TOLERANCE,
    Errors,
    errors_of,
    tolerance,
    verdict,
)
from moebench.point import PRECISIONS
from moebench.yardsticks import MAX_BYTES, MIN_BYTES, Shelf, Yardstick, make_yardstick


def yardstick(name: str, precision: str = "fp32", flops: float = 2 * 64**3, cache_bytes: int = 0) -> Yardstick:
    return make_yardstick(name, precision=precision, device="cpu", flops=flops, cache_bytes=cache_bytes)


@pytest.mark.parametrize("name", ["copy", "read", "gemm"])
def test_checks_pass(name: str) -> None:
    made = yardstick(name)
    made.call(0)
    errors, wrong = made.check()
    assert (made.name, wrong) == (name, None)
    assert errors.rel < 1e-4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gemm_in_every_precision(precision: str) -> None:
    errors, wrong = yardstick("gemm", precision).check()
    assert wrong is None
    assert errors.rel < REL_TOLERANCE[precision]
    assert (errors.rel == 0) == (precision == "int8"), "integers alone are multiplied without rounding"


def test_moved_bytes_are_past_the_cache() -> None:
    copy, read = yardstick("copy"), yardstick("read")
    assert copy.moved_bytes == 2 * MIN_BYTES  # read and written
    assert read.moved_bytes == MIN_BYTES
    assert (copy.flops, read.flops) == (0, 0)
    assert yardstick("read", cache_bytes=20 << 20).moved_bytes == 80 << 20
    assert MAX_BYTES >= 4 * MIN_BYTES


@pytest.mark.parametrize("flops", [1e5, 1e7, 1e8])
def test_gemm_takes_about_the_flops_it_is_asked_for(flops: float) -> None:
    made = yardstick("gemm", flops=flops)
    assert made.flops == pytest.approx(flops, rel=0.4)
    out = made.call(0)
    assert made.flops == 2 * out.shape[0] ** 3
    assert not torch.equal(out, made.call(1))  # draws rotate
    assert torch.equal(out, made.call(4))


def test_a_copy_that_does_not_copy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    made = yardstick("copy")
    made.call(0)  # what an earlier call has copied does not count
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: self)
    assert made.check()[1] == "the copy differs from its source"


def test_a_copy_that_misses_an_element_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    made = yardstick("copy")

    def almost(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        target[:-1] = source[:-1]
        return target

    monkeypatch.setattr(torch.Tensor, "copy_", almost)
    assert made.check()[1] is not None


def test_a_read_that_stops_half_way_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    made, whole = yardstick("read"), torch.Tensor.sum

    def half(value: torch.Tensor) -> torch.Tensor:
        return whole(value[: len(value) // 2] if value.dtype == torch.float32 else value)

    monkeypatch.setattr(torch.Tensor, "sum", half)
    assert made.check()[1].startswith(("the sum is off by 0.5", "the sum is off by 0.49"))


def test_a_wrong_gemm_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    made, right = yardstick("gemm"), torch.Tensor.__matmul__

    def loose(a: torch.Tensor, b: torch.Tensor) -> Any:
        return right(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else right(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", loose)
    assert "against the float64 oracle" in made.check()[1]


# Error norms.


def test_errors_by_hand() -> None:
    expected = torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=torch.float64)
    actual = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    found = errors_of(actual, expected)
    assert found.rel == pytest.approx(1 / 5)
    assert found.max == pytest.approx(1 / 2.5)  # RMS is sqrt(25 / 4)
    assert errors_of(expected.float(), expected) == NO_ERROR


def test_one_bad_element_in_a_million_shows_in_max() -> None:
    expected = torch.ones(1000, 1000, dtype=torch.float64)
    actual = expected.float().clone()
    actual[500, 500] = 1.005
    found = errors_of(actual, expected)
    assert found.rel == pytest.approx(5e-6, rel=0.01)
    assert found.max == pytest.approx(5e-3, rel=0.01)
    assert verdict(found, tolerance("fp32", NO_ERROR)).startswith("largest error 0.005 of the RMS")


def test_nan_and_infinity_are_wrong() -> None:
    expected = torch.ones(4, dtype=torch.float64)
    for value in (math.nan, math.inf):
        actual = expected.float().clone()
        actual[2] = value
        found = errors_of(actual, expected)
        assert verdict(found, Errors(1e9, 1e9)) is not None
        assert not math.isfinite(NO_ERROR.worst(found).rel)
        assert not math.isfinite(found.worst(NO_ERROR).max)
    assert verdict(Errors(math.nan, 0.0), Errors(1, 1)) is not None
    assert verdict(Errors(0.0, math.nan), Errors(1, 1)) is not None


def test_what_must_be_zero_must_be_exactly_zero() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert errors_of(torch.zeros(3), zero) == NO_ERROR
    assert errors_of(torch.tensor([0.0, 1e-30, 0.0]), zero) == Errors(math.inf, math.inf)
    assert errors_of(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.float64)) == NO_ERROR


def test_tolerance_is_the_table_or_what_eager_errs() -> None:
    for precision in PRECISIONS:
        table = Errors(REL_TOLERANCE[precision], MAX_TOLERANCE[precision])
        assert tolerance(precision, NO_ERROR) == table
        assert tolerance(precision, Errors(0.1, 0.5)) == Errors(max(0.1 * EAGER_FACTOR, table.rel), 0.5 * EAGER_FACTOR)
    assert REL_TOLERANCE["fp32"] < REL_TOLERANCE["fp16"] < REL_TOLERANCE["bf16"] < 0.1


def test_worst_and_times() -> None:
    assert Errors(1, 5).worst(Errors(2, 3)) == Errors(2, 5)
    assert Errors(1, 5).times(BACKWARD_FACTOR) == Errors(BACKWARD_FACTOR, 5 * BACKWARD_FACTOR)


def test_a_verdict_says_both_numbers() -> None:
    assert verdict(Errors(0.5, 0), Errors(0.1, 1)) == "relative error 0.5 against the float64 oracle; allowed is 0.1"
    assert verdict(Errors(0.1, 1), Errors(0.1, 1)) is None


def test_a_yardstick_is_made_once_while_it_stays_the_same() -> None:
    shelf = Shelf()

    def get(name: str, precision: str = "fp32", flops: float = 1e6) -> Yardstick:
        return shelf.get(name, precision, "cpu", flops, 0)

    copy, gemm, other = get("copy"), get("gemm"), get("gemm", "bf16")
    assert get("copy", "bf16", 2e6) is copy, "it depends on neither"
    assert get("gemm") is gemm
    larger = get("gemm", flops=8e6)
    assert larger.flops > gemm.flops
    assert get("gemm") is not gemm, "only the last one is kept"
    assert get("gemm", "bf16") is other
    shelf.clear()
    assert get("copy") is not copy
