"""Dollars and grams by hand."""

from __future__ import annotations

import pytest

from moebench.catalogue.cost import cost_inputs, gco2_per_mtok, usd_per_mtok
from moebench.catalogue.hardware import Hardware, hardware_table

RENTED = Hardware("r", usd_per_gpu_hour=3.6, price_basis="a list, 2026-01")
OWNED = Hardware("o", price_usd=31_557_600.0, life_years=2.0, utilisation=0.5)  # one dollar a second
POWERED = Hardware(
    "p", price_usd=31_557_600.0, life_years=2.0, utilisation=0.5, tariff_usd_per_kwh=0.36, pue=1.5, gco2_per_kwh=360.0
)


def test_rent() -> None:
    # 3.6 $/h is 0.001 $/s: a million tokens at 1000 tokens/s take 1000 s.
    assert usd_per_mtok(1000.0, RENTED) == pytest.approx(1.0)
    assert usd_per_mtok(1000.0, RENTED, n_devices=8, watts=500.0) == pytest.approx(8.0)


def test_owned() -> None:
    assert usd_per_mtok(1000.0, OWNED) == pytest.approx(1000.0)
    # 1000 W x 1.5 for 1000 s are 0.41667 kWh, 0.15 $.
    assert usd_per_mtok(1000.0, POWERED, watts=1000.0) == pytest.approx(1000.15)


def test_no_price_or_no_measured_power_is_null() -> None:
    assert usd_per_mtok(1000.0, None) is None
    assert usd_per_mtok(1000.0, Hardware("x", power_w=700.0)) is None
    # Rated power is not measured power.
    assert usd_per_mtok(1000.0, POWERED) is None
    assert usd_per_mtok(1000.0, hardware_table()["RTX-5090"]) is None


def test_owning_stands_above_rent() -> None:
    both = Hardware("b", usd_per_gpu_hour=3.6, price_usd=31_557_600.0, life_years=2.0, utilisation=0.5)
    assert usd_per_mtok(1000.0, both) == pytest.approx(1000.0)
    half = Hardware("h", usd_per_gpu_hour=3.6, price_usd=31_557_600.0)
    assert usd_per_mtok(1000.0, half) == pytest.approx(1.0)


def test_carbon() -> None:
    assert gco2_per_mtok(1000.0, POWERED, watts=1000.0) == pytest.approx(150.0)
    assert gco2_per_mtok(1000.0, POWERED) is None
    assert gco2_per_mtok(1000.0, RENTED, watts=1000.0) is None
    assert gco2_per_mtok(1000.0, None, watts=1000.0) is None


def test_inputs_are_stated_with_their_basis() -> None:
    rented = cost_inputs(RENTED)
    assert rented is not None
    assert (rented["basis"], rented["usd_per_gpu_hour"], rented["price_basis"]) == ("rent", 3.6, "a list, 2026-01")
    assert (rented["pue"], rented["pue_assumed"]) == (1.0, True)
    owned = cost_inputs(POWERED)
    assert owned is not None
    assert (owned["basis"], owned["life_years"], owned["pue"], owned["pue_assumed"]) == ("owned", 2.0, 1.5, False)
    assert cost_inputs(None) is None
    assert cost_inputs(Hardware("x")) is None


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
def test_a_speed_that_is_none(speed: float) -> None:
    with pytest.raises(ValueError, match="tokens_per_s"):
        usd_per_mtok(speed, RENTED)
