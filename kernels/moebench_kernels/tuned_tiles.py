"""Tuned tiles: a file for each device, written by `moebench tune`, read here; and the pick for a device.

    {"schema": 1, "device": "NVIDIA H200", "device_family": "sm_90", "triton": "3.7.1",
     "entries": [{"kind": "gated_gather", "dtype": "bfloat16", "block_m": 128, "n": 768, "k": 2048,
                  "config": {"block_n": 256, "block_k": 64, "num_warps": 8, "num_stages": 4}, "median_ms": null}]}

Kinds are those of tiles.py, where n and k are a map's columns and the inner size, and of ragged_tiles.py, where n and k
are the columns and the rows of a dW and block_m stands for the load (`tile_rows` of the mean rows of an expert).

In use is, first found: what `use_tuned` was given; the file that the environment variable MOEBENCH_TILES
names; `tuned/<device>.json` beside this file. A field of `config` that is left out has its default.
"""

import json
import math
import os
import re
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moebench_kernels import runtime
from moebench_kernels.ragged_tiles import RAGGED_KINDS, RaggedConfig, ragged_config
from moebench_kernels.tiles import FAMILIES, SHARED_KB, GemmConfig, device_family, gemm_config, shared_bytes

Config = GemmConfig | RaggedConfig

MAX_FILE_BYTES = 4 << 20


@dataclass(frozen=True)
class Tuned:
    """A tuned file: entries[kind, dtype, block_m] = [(n, k, config), ...]."""

    device: str
    device_family: str
    entries: dict[tuple[str, str, int], list[tuple[int, int, Config]]]

    def nearest(self, kind: str, dtype: torch.dtype, block_m: int, N: int, K: int) -> Any:
        """The entry of the nearest shape, at most a factor of two away in all; None without one."""
        near = [
            (abs(math.log2(n / N)) + abs(math.log2(k / K)), n, k, config)
            for n, k, config in self.entries.get((kind, str(dtype).removeprefix("torch."), block_m), [])
        ]
        best = min(near, key=lambda entry: entry[:3], default=None)
        return best[3] if best and best[0] <= 1 else None


def load_tuned(path: str | Path) -> Tuned:
    """Read a tuned file.

    Raises:
        ValueError: it cannot be read, is no such file, or was tuned with another version of triton; one line.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"the tiles file {path} cannot be used: {why}") from None


def _parse(text: Any) -> Tuned:
    if not isinstance(text, dict) or text.get("schema") != 1:
        raise ValueError("it is not a tiles file of schema 1")
    family, version, entries = text.get("device_family"), str(text.get("triton")), text.get("entries")
    if family not in FAMILIES or not isinstance(text.get("device"), str) or not isinstance(entries, list):
        raise ValueError(f"it needs device (text), device_family (one of {', '.join(FAMILIES)}) and entries (a list)")
    here = getattr(runtime.triton, "__version__", version)
    if version.split(".")[:2] != here.split(".")[:2]:
        raise ValueError(f"it was tuned with triton {version}, this is {here}; tune again")
    found: dict[tuple[str, str, int], list[tuple[int, int, Config]]] = {}
    for number, entry in enumerate(entries):
        try:
            kind, dtype, block_m, n, k, config = _entry(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"entry {number}: {type(error).__name__}: {error}") from None
        found.setdefault((kind, dtype, block_m), []).append((n, k, config))
    return Tuned(text["device"], family, found)


_RANGES = dict.fromkeys(("block_m", "block_n", "block_k", "block_r"), (16, 512))
_RANGES |= {"num_warps": (1, 16), "num_stages": (1, 10), "group_m": (1, 64), "ctas_per_sm": (1, 8), "per_unit": (1, 8)}


def _entry(entry: dict[str, Any]) -> tuple[str, str, int, int, int, Config]:
    kind, dtype = entry["kind"], entry["dtype"]
    if not isinstance(kind, str) or not isinstance(dtype, str):
        raise ValueError("kind and dtype are texts")
    sizes = [entry[name] for name in ("block_m", "n", "k")]
    if any(type(size) is not int or not 1 <= size < 2**31 for size in sizes):
        raise ValueError("block_m, n and k are positive integers")
    config = (RaggedConfig if kind in RAGGED_KINDS else GemmConfig)(**entry["config"])
    for field in fields(config):
        value = getattr(config, field.name)
        low, high = _RANGES.get(field.name, (0, 1))
        if type(value) is not (int if field.name in _RANGES else bool) or not low <= value <= high:
            raise ValueError(f"{field.name} is {value!r}")
    for name, value in vars(config).items():
        if (name.startswith("block_") or name == "num_warps") and value & (value - 1):
            raise ValueError(f"{name} is {value}; a power of two is needed")
    return kind, dtype, *sizes, config


_chosen: list[Tuned] = []


def use_tuned(tuned: Tuned | str | Path | None) -> None:
    """From now on take tiles from this file on devices of its family; None: as without this call.

    Raises:
        ValueError: see `load_tuned`.
    """
    chosen = [] if tuned is None else [tuned if isinstance(tuned, Tuned) else load_tuned(tuned)]
    _chosen[:] = chosen
    _pick.cache_clear()
    _pick_ragged.cache_clear()


def device_slug(name: str) -> str:
    """A device's name as a file is named: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def pick_config(kind: str, block_m: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> GemmConfig:
    """`gemm_config` for a device: with the tuned file in use there, and cut down to its shared memory."""
    return _pick(kind, block_m, N, K, dtype, device, os.environ.get("MOEBENCH_TILES", ""))


@lru_cache(maxsize=4096)
def _pick(kind: str, block_m: int, N: int, K: int, dtype: torch.dtype, device: torch.device, path: str) -> GemmConfig:
    family = device_family(device)
    c = gemm_config(kind, block_m, N, K, dtype, family, _tuned_for(device, family, path))
    return shrunk(c, block_m, dtype, family, shared_limit(device))


def shared_limit(device: torch.device) -> int | None:
    """Bytes of shared memory a program may have, where the device has less than its family; else None."""
    full = SHARED_KB[device_family(device)] * 1024
    if device.type == "cpu":
        return None
    limit: int = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", full)
    return limit if limit < full else None


def shrunk(c: GemmConfig, block_m: int, dtype: torch.dtype, family: str, limit: int | None) -> GemmConfig:
    """The tile that is launched where `shared_limit` is `limit`."""
    return c if limit is None else _shrink(c, block_m, dtype.itemsize, family, limit)


def pick_ragged_config(kind: str, load: int, M: int, N: int, dtype: torch.dtype, device: torch.device) -> RaggedConfig:
    """`ragged_config` for a device, with the tuned file in use there."""
    return _pick_ragged(kind, load, M, N, dtype, device, os.environ.get("MOEBENCH_TILES", ""))


@lru_cache(maxsize=4096)
def _pick_ragged(
    kind: str, load: int, M: int, N: int, dtype: torch.dtype, device: torch.device, path: str
) -> RaggedConfig:
    family = device_family(device)
    return ragged_config(kind, M, N, dtype, family, load=load, tuned=_tuned_for(device, family, path))


def _shrink(c: GemmConfig, block_m: int, itemsize: int, family: str, limit: int) -> GemmConfig:
    """For a device with less shared memory than its kin (sm_86, sm_89, sm_120): fewer stages, then smaller blocks."""
    while shared_bytes(c, block_m, itemsize, family) > limit:
        if c.num_stages > 2:
            c = replace(c, num_stages=c.num_stages - 1)
        elif c.block_k > 32:
            c = replace(c, block_k=c.block_k // 2)
        elif c.block_n > 32:
            c = replace(c, block_n=c.block_n // 2, halves=False)
        else:
            break
    return c


def _tuned_for(device: torch.device, family: str, path: str) -> Tuned | None:
    """The file in use; one that was named must be of the device's family."""
    if _chosen or path:
        tuned = _chosen[0] if _chosen else load_tuned(path)
        if tuned.device_family != family:
            raise ValueError(
                f"the tiles in use are for {tuned.device_family} ({tuned.device}); this device is {family}"
            )
        return tuned
    if device.type == "cpu":
        return None
    own = Path(__file__).parent / "tuned" / f"{device_slug(torch.cuda.get_device_name(device))}.json"
    return load_tuned(own) if own.is_file() else None
