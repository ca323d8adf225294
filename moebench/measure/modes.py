"""Modes of the process that change a number without a trace: threads, cores, dtype modes. Set, read, put back.

A provider may change them (some libraries do so when they are imported), and the arms that
follow would then be measured under other rules. So they are set when a block opens, compared after every
message, put back at once where they have changed, and put back for good when the block closes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class Modes:
    """What a block is measured under.

    Attributes:
        threads: torch's threads inside an operator.
        cores: logical cores that the process may use; empty where the system does not say.
        tf32: whether float32 GEMMs may round their inputs to TF32.
        reduced_precision_reductions: whether fp16 and bf16 GEMMs may add up in their own precision.
        fp16_accumulation: whether fp16 GEMMs accumulate in fp16.
        deterministic: whether only deterministic algorithms may run.
        default_dtype: of tensors made without one.
    """

    threads: int
    cores: tuple[int, ...]
    tf32: bool
    reduced_precision_reductions: bool
    fp16_accumulation: bool
    deterministic: bool
    default_dtype: str

    def text(self) -> str:
        """The dtype modes in one line, as records carry them."""
        shown = ("tf32", "reduced_precision_reductions", "fp16_accumulation", "deterministic")
        return " ".join(f"{name}={'on' if getattr(self, name) else 'off'}" for name in shown)


def current_modes() -> Modes:
    """As they are now."""
    matmul = torch.backends.cuda.matmul
    return Modes(
        threads=torch.get_num_threads(),
        cores=_cores(),
        tf32="tf32" in (matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision),  # type: ignore[attr-defined]
        reduced_precision_reductions=bool(
            matmul.allow_fp16_reduced_precision_reduction and matmul.allow_bf16_reduced_precision_reduction
        ),
        fp16_accumulation=bool(matmul.allow_fp16_accumulation),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        default_dtype=str(torch.get_default_dtype()).removeprefix("torch."),
    )


def wanted_modes(
    *, threads: int | None, cores: Iterable[int] | None, tf32: bool, reduced_precision_reductions: bool
) -> Modes:
    """What a suite asks for; threads and cores it does not name are as many as this process has now.

    Raises:
        ValueError: a core this process may not use, or more threads than cores.
    """
    now = current_modes()
    chosen = now.cores if cores is None else tuple(sorted(set(cores)))
    strangers = [core for core in chosen if core not in now.cores]
    if cores is not None and strangers:
        raise ValueError(f"modes.cores: core {strangers[0]} is not one of those usable here ({_listed(now.cores)})")
    most = len(chosen) or os.cpu_count() or 1
    if threads is not None and threads > most:
        raise ValueError(f"modes.threads: {threads} threads are more than the {most} cores they may use")
    return replace(
        now,
        threads=threads or min(now.threads, most),
        cores=chosen,
        tf32=tf32,
        reduced_precision_reductions=reduced_precision_reductions,
        fp16_accumulation=False,
        deterministic=False,
        default_dtype="float32",
    )


def apply_modes(modes: Modes) -> None:
    """Make them so; what already is so is left alone."""
    now = current_modes()
    matmul = torch.backends.cuda.matmul
    if now.threads != modes.threads:
        torch.set_num_threads(modes.threads)
    if now.cores != modes.cores:
        _pin(modes.cores)
    if now.tf32 != modes.tf32:
        # The one setter that keeps PyTorch's older and newer switches, and all backends, at one value.
        torch.set_float32_matmul_precision("high" if modes.tf32 else "highest")
    if now.reduced_precision_reductions != modes.reduced_precision_reductions:
        matmul.allow_fp16_reduced_precision_reduction = modes.reduced_precision_reductions
        matmul.allow_bf16_reduced_precision_reduction = modes.reduced_precision_reductions
    if now.fp16_accumulation != modes.fp16_accumulation:
        matmul.allow_fp16_accumulation = modes.fp16_accumulation
    if now.deterministic != modes.deterministic:
        torch.use_deterministic_algorithms(modes.deterministic)
    if now.default_dtype != modes.default_dtype:
        torch.set_default_dtype(getattr(torch, modes.default_dtype))


def put_back(modes: Modes) -> list[str]:
    """Undo what has changed since; returns the names of what had."""
    now = current_modes()
    changed = [field.name for field in fields(modes) if getattr(now, field.name) != getattr(modes, field.name)]
    if changed:
        apply_modes(modes)
    return changed


def _cores() -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def _pin(cores: tuple[int, ...]) -> None:
    """All threads of this process: those that a pool has started already would stay where they are."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        return
    for task in os.listdir(TASKS) if TASKS.exists() else ["0"]:
        with suppress(ProcessLookupError):  # a thread that has ended meanwhile
            os.sched_setaffinity(int(task), cores)


def _listed(cores: tuple[int, ...]) -> str:
    return ", ".join(map(str, cores)) if len(cores) <= 8 else f"{cores[0]} to {cores[-1]}, {len(cores)} of them"
