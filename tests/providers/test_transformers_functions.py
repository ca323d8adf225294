"""transformers' own experts functions, really run on a CPU against the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peer_arms import case, verdict_of

from moebench.catalogue.spec import LayerSpec
from moebench.point import Capacity
from moebench.providers import transformers as adapter
from moebench.providers.load import load
from moebench.weights import make_weights

pytest.importorskip("transformers.integrations.moe", reason="transformers >= 5.0 is not installed")
NAMES = ["transformers-eager", "transformers-batched-mm", "transformers-grouped-mm"]
TINY = LayerSpec(32, 16, 8, 2)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("capacity", ["dropless", 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_against_the_oracle(name: str, capacity: Any, direction: str) -> None:
    if capacity != "dropless" and (reason := load(name).refuse(case(capacity=Capacity(capacity), layer=TINY))):
        pytest.skip(reason)
    for layer, more in (
        (TINY, {}),
        (replace(TINY, activation="geglu"), {"scope": "layer"}),
        (replace(TINY, top_k=1), {"traffic": "zipf:20"}),  # seven idle experts
        (replace(TINY, routed_experts=3, top_k=3), {"tokens": 1}),
    ):
        verdict = verdict_of(load(name), layer, capacity=capacity, direction=direction, **more)
        assert verdict.wrong is None, (layer, more, verdict.wrong)


@pytest.mark.parametrize("name", NAMES)
def test_16_bits(name: str) -> None:
    for precision in ("bf16", "fp16"):
        assert verdict_of(load(name), TINY, precision=precision, direction="forward_backward").wrong is None


@pytest.mark.parametrize("name", NAMES)
def test_it_is_transformers_that_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name runs the function of its own: spoilt there, the answer is wrong here, and nowhere else."""
    from transformers.integrations import moe
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    real = {"batched_mm": moe.batched_mm_experts_forward, "grouped_mm": moe.grouped_mm_experts_forward}
    wanted = name.removeprefix("transformers-").replace("-", "_")
    for implementation, function in real.items():
        spoilt = (lambda f: lambda *given: f(*given) * 1.5)(function) if implementation == wanted else None
        monkeypatch.setitem(moe.ExpertsInterface._global_mapping, implementation, spoilt)
    assert MixtralExperts.forward.__wrapped__ is not None  # eager is the class's own forward
    wrong = verdict_of(load(name), TINY).wrong
    assert (wrong is None) == (wanted == "eager"), wrong


def test_what_is_executed() -> None:
    counts = torch.tensor([3, 0, 2, 0, 0, 0])
    asked = case(capacity=Capacity(0.5), tokens=13)
    per_row = 2 * asked.layer.expert_params()
    assert adapter.GROUPED_MM.executed_flops(asked, counts) == 5 * per_row
    assert adapter.BATCHED_MM.executed_flops(asked, counts) == 26 * per_row


def test_copies_that_cannot_fit_are_an_error_and_not_a_killed_process() -> None:
    weights = make_weights(TINY, "fp32", "cpu", 0)
    huge = case(layer=TINY, tokens=10**9, precision="fp32", device_kind="cpu")
    with pytest.raises(MemoryError, match="copies the weights for every assignment"):
        adapter.BATCHED_MM.prepare(weights, huge)


def test_refusals() -> None:
    relu = case(layer=replace(TINY, activation="relu"))
    assert adapter.EAGER.refuse(relu) == "transformers-eager does not compute activation 'relu'"
    assert "multiple of 16 bytes" in str(adapter.GROUPED_MM.refuse(case(layer=replace(TINY, expert_ffn_size=9))))


def test_an_older_loop_takes_no_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its one-hot has no place for the id E: on a GPU an assertion there takes the worker with it."""
    capped = case(layer=TINY, capacity=Capacity(0.5))
    for version, refused in (("5.17.0", True), ("5.18.0.dev0", False), ("6.0", False)):
        monkeypatch.setattr("transformers.__version__", version)
        assert bool(adapter.EAGER.refuse(capped)) == refused, version
        assert adapter.EAGER.refuse(case(layer=TINY)) is None
