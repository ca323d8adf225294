"""Peers written in Triton, really run: in the interpreter, where they are installed and it is on.

The interpreter has no autotuner, so each kernel runs in its first config. That shows that the adapter calls the
library rightly; what a GPU makes of it, it does not show.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from peer_arms import on_cpu, verdict_of

from moebench.catalogue.spec import LayerSpec
from moebench.providers import PROVIDERS

kernels = pytest.importorskip("moebench_kernels")
if not kernels.interpreting():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)
SMALL = LayerSpec(64, 32, 4, 2)


@pytest.fixture
def first_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an autotuned kernel, without benchmarking."""

    def run(self: Any, *given: Any, **more: Any) -> Any:
        return self.fn.run(*given, **more, **self.configs[0].all_kwargs())

    monkeypatch.setattr("triton.runtime.autotuner.Autotuner.run", run)


@pytest.mark.slow
@pytest.mark.usefixtures("first_config")
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", ["liger", "moe-ops", "scattermoe"])
def test_against_the_oracle(name: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = PROVIDERS[name].needs
    assert needs is not None
    pytest.importorskip(needs.module, reason=f"{needs.module} is not installed")
    if name == "moe-ops":  # it asks the driver, and there is none
        monkeypatch.setattr("moe_ops.grouped_gemm_ops_sm90.is_cuda", lambda: False)
    provider = importlib.import_module(PROVIDERS[name].target.partition(":")[0]).PROVIDER
    with torch.compiler.set_stance("force_eager"):  # scattermoe compiles its sort, which is none of the kernels
        verdict = verdict_of(on_cpu(provider), SMALL, 9, direction=direction)
    assert verdict.wrong is None
