"""Dollars and grams of CO2 per million tokens. No torch.

usd_per_mtok = ($ per second) / (tokens per second) x 10^6, where $ per second is
rent, or price / (life x utilisation) + measured W x PUE x tariff. "Per token" is
a token that enters one layer.
"""

from __future__ import annotations

from moebench.catalogue.hardware import Hardware

SECONDS_PER_HOUR = 3600.0
SECONDS_PER_YEAR = 365.25 * 24 * SECONDS_PER_HOUR
JOULES_PER_KWH = 3.6e6


def usd_per_mtok(
    tokens_per_s: float, hardware: Hardware | None, n_devices: int = 1, watts: float | None = None
) -> float | None:
    """US dollars per million tokens; None without a price.

    Args:
        tokens_per_s: measured, over all devices together; above 0.
        hardware: the device's row, or None.
        n_devices: devices paid for.
        watts: measured power of all devices together; needed where the row has a tariff, since rated
            power is not a measurement.
    """
    _check(tokens_per_s)
    per_second = _usd_per_second(hardware, n_devices, watts) if hardware else None
    return None if per_second is None else 1e6 * per_second / tokens_per_s


def gco2_per_mtok(tokens_per_s: float, hardware: Hardware | None, watts: float | None = None) -> float | None:
    """Grams of CO2 per million tokens: measured W x PUE x carbon intensity; None without either.

    Args:
        tokens_per_s: measured, over all devices together; above 0.
        hardware: the device's row, or None.
        watts: measured power of all devices together.
    """
    _check(tokens_per_s)
    if hardware is None or hardware.gco2_per_kwh is None or watts is None:
        return None
    return 1e6 * watts * _pue(hardware) / JOULES_PER_KWH * hardware.gco2_per_kwh / tokens_per_s


def cost_inputs(hardware: Hardware | None) -> dict[str, object] | None:
    """What the cost columns rest on, for the manifest; None where the device has neither price nor intensity."""
    if hardware is None:
        return None
    basis = price_kind(hardware)
    if basis is None and hardware.gco2_per_kwh is None:
        return None
    named = {
        "rent": ("usd_per_gpu_hour",),
        "owned": ("price_usd", "life_years", "utilisation", "tariff_usd_per_kwh"),
        None: (),
    }[basis]
    inputs: dict[str, object] = {"device": hardware.name, "basis": basis}
    inputs |= {name: getattr(hardware, name) for name in (*named, "gco2_per_kwh")}
    inputs |= {"pue": _pue(hardware), "pue_assumed": hardware.pue is None}
    return inputs | {"price_basis": hardware.price_basis or None, "source": hardware.source or None}


def price_kind(hardware: Hardware) -> str | None:
    """ "rent", "owned" (price, life and utilisation are all given; they come first), or None."""
    if None not in (hardware.price_usd, hardware.life_years, hardware.utilisation):
        return "owned"
    return "rent" if hardware.usd_per_gpu_hour is not None else None


def _usd_per_second(hardware: Hardware, n_devices: int, watts: float | None) -> float | None:
    kind = price_kind(hardware)
    if kind == "rent":
        assert hardware.usd_per_gpu_hour is not None
        return n_devices * hardware.usd_per_gpu_hour / SECONDS_PER_HOUR
    if kind is None:
        return None
    assert hardware.price_usd is not None
    assert hardware.life_years is not None
    assert hardware.utilisation is not None
    capital = n_devices * hardware.price_usd / (hardware.life_years * SECONDS_PER_YEAR * hardware.utilisation)
    if hardware.tariff_usd_per_kwh is None:
        return capital
    if watts is None:
        return None
    return capital + watts * _pue(hardware) / JOULES_PER_KWH * hardware.tariff_usd_per_kwh


def _pue(hardware: Hardware) -> float:
    return 1.0 if hardware.pue is None else hardware.pue


def _check(tokens_per_s: float) -> None:
    if not tokens_per_s > 0:
        raise ValueError(f"tokens_per_s is {tokens_per_s}; it must be above 0")
