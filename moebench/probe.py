"""What this machine can measure, as JSON on stdout. Run as a process of its own by `list providers` and `doctor`."""

from __future__ import annotations

import json
from typing import Any

from moebench.measure import device, energy_meters, memory
from moebench.providers import PROVIDERS, entry_points
from moebench.providers.load import Unavailable, load
from moebench.worker import Worker


def main() -> None:
    """Print the probe's findings."""
    hello = Worker().hello("auto")
    kind = hello["device_kind"]
    names = [*PROVIDERS, *entry_points()]
    print(json.dumps({"facts": _facts(hello), "providers": {name: _provider(name, kind) for name in names}}))


def _provider(name: str, device_kind: str) -> dict[str, Any]:
    try:
        provider = load(name)
    except Unavailable as error:
        return {"state": "unavailable", "version": None, "reason": str(error)}
    if provider.interpreted(device_kind):
        reason = "runs in Triton's interpreter on a CPU: verified on a reduced twin, never timed"
        return {"state": "interpreted", "version": provider.version, "reason": reason}
    return {"state": "ready", "version": provider.version, "reason": None}


def _facts(hello: dict[str, Any]) -> list[list[str]]:
    kind = hello["device_kind"]
    meter, why = energy_meters.find_meter(kind)
    peak, no_peak = memory.peak_memory(lambda: None, kind)
    versions = ", ".join(f"{name} {version}" for name, version in hello["versions"].items())
    cache = device.llc_bytes(kind)
    return [
        ["device", kind, hello["device"]],
        ["versions", "ready", versions],
        ["memory available", "ready", f"{hello['available_bytes'] / 1e9:.1f} GB"],
        ["last-level cache", "ready" if cache else "unknown", f"{cache / 2**20:.0f} MiB" if cache else "not reported"],
        ["peak memory", "unavailable" if peak is None else "ready", no_peak or "measured around a solo pass"],
        ["energy", "ready" if meter else "unavailable", meter.name if meter else str(why)],
    ]


if __name__ == "__main__":
    main()
