"""Every provider, listed once: name -> the module attribute that holds it. No torch until one is loaded.

A provider may also be `path/to/file.py:function`, or the name of an entry point
in the group `moebench.providers`; both hold a function
`f(x, ids, weights, w_gate_up, w_down) -> y` (docs/providers.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

ENTRY_POINT_GROUP = "moebench.providers"


@dataclass(frozen=True)
class Listing:
    """Where a provider lives and what it is."""

    target: str  # "module:attribute"
    summary: str
    role: str = "arm"


PROVIDERS: dict[str, Listing] = {
    "torch-loop": Listing("moebench.providers.torch_loop:PROVIDER", "a Python loop over the experts"),
    "torch-bmm": Listing("moebench.providers.torch_bmm:PROVIDER", "capacity-padded batched GEMM (GShard style)"),
    "torch-grouped": Listing("moebench.providers.torch_grouped:PROVIDER", "torch.nn.functional.grouped_mm"),
    "torch-compile": Listing("moebench.providers.torch_compiled:PROVIDER", "torch.compile of the grouped or bmm form"),
    "torch-dense": Listing("moebench.providers.torch_dense:PROVIDER", "all experts on all tokens, weighted"),
    "triton": Listing("moebench.providers.triton:PROVIDER", "moebench's own Triton kernels"),
    "dense-ffn": Listing(
        "moebench.providers.dense_ffn:PROVIDER", "one FFN of the same active FLOPs: the price of sparsity", "yardstick"
    ),
}


def is_known(name: str) -> bool:
    """Whether a suite may name it (a file reference is checked when it is loaded)."""
    return name in PROVIDERS or is_file(name) or name in entry_points()


def is_file(name: str) -> bool:
    """Whether it reads as `path/to/file.py:function`."""
    path, _, function = name.rpartition(":")
    return path.endswith(".py") and function.isidentifier()


def entry_points() -> dict[str, str]:
    """Providers that other installed distributions offer: name -> "module:attribute"."""
    from importlib.metadata import entry_points as installed

    return {entry.name: entry.value for entry in installed(group=ENTRY_POINT_GROUP)}


def unknown(name: str) -> str:
    """One line that says why the name is no provider, with the nearest one."""
    near = get_close_matches(name, [*PROVIDERS, *entry_points()], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = ", ".join(PROVIDERS)
    return f"provider {name!r} is not known{hint} (known: {known}, or path/to/file.py:function)"
