"""Soft MoE, against loops."""

from __future__ import annotations

import math

import pytest
import torch
from assignment_oracles import adversarial, by_columns

from moebench.catalogue.spec import RouterSpec
from moebench.routing.mixing import normalised, soft_moe
from moebench.routing.scores import Scores, Side

CASES = adversarial(23, 6)


@pytest.mark.parametrize("slots", [1, 2, 3, 6])
@pytest.mark.parametrize("case", CASES)
def test_float64_matches_loops(case: str, slots: int) -> None:
    z = CASES[case].double()
    mix = soft_moe(Scores(z), RouterSpec(slots=slots), 1)
    torch.testing.assert_close(mix.dispatch, torch.tensor(by_columns(z.tolist(), True)).double())
    torch.testing.assert_close(mix.combine, torch.tensor(by_columns(z.tolist(), False)).double())
    assert mix.routed_experts == 6 // slots
    assert mix.slot_expert.tolist() == [s // slots for s in range(6)]


@pytest.mark.parametrize("case", CASES)
def test_float32_columns_and_rows_sum_to_one(case: str) -> None:
    mix = soft_moe(Scores(CASES[case]), RouterSpec(slots=2), 1)
    torch.testing.assert_close(mix.dispatch.sum(dim=0), torch.ones(6))
    torch.testing.assert_close(mix.combine.sum(dim=1), torch.ones(23))
    assert bool(((mix.dispatch >= 0) & (mix.combine >= 0)).all())
    assert mix.dispatch.dtype == torch.float32


def test_logits_are_scaled_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    x, phi = (torch.randn(n, 5, generator=generator).double() for n in (7, 4))
    x[3] = 0.0  # stays zero
    gate = {"router": phi, "slot_scale": torch.tensor(3.0).double()}
    logits = normalised(RouterSpec(slots=2), x, gate, Side()).logits
    for t in range(7):
        for s in range(4):
            a, b = x[t].tolist(), phi[s].tolist()
            norm = math.sqrt(sum(v * v for v in a) + 1e-6) * math.sqrt(sum(v * v for v in b) + 1e-6)
            expected = 3.0 * sum(v * w for v, w in zip(a, b, strict=True)) / norm
            assert logits[t, s].item() == pytest.approx(expected, abs=1e-12)
    assert logits[3].tolist() == [0.0] * 4


def test_logits_do_not_depend_on_lengths_and_are_wide() -> None:
    x, phi = torch.randn(7, 16), torch.randn(4, 16)
    gate = {"router": phi, "slot_scale": torch.tensor(2.0)}
    first = normalised(RouterSpec(), x, gate, Side()).logits
    longer = normalised(RouterSpec(), x * 1000, {**gate, "router": phi * 50}, Side()).logits
    torch.testing.assert_close(first, longer)
    half = {name: value.bfloat16() for name, value in gate.items()}
    logits = normalised(RouterSpec(), x.bfloat16(), half, Side()).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, first, atol=0.03, rtol=0.0)


def test_slots_must_fit_experts() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        soft_moe(Scores(torch.zeros(3, 5)), RouterSpec(slots=2), 1)


def test_gradients_and_causality() -> None:
    z = CASES["normal"][:5].double().requires_grad_()
    for name in ("dispatch", "combine"):
        assert torch.autograd.gradcheck(
            lambda logits, name=name: getattr(soft_moe(Scores(logits), RouterSpec(), 1), name), (z,)
        )
    after = CASES["normal"].clone()
    after[22] += 3.0 * torch.arange(6)
    first, second = (soft_moe(Scores(each), RouterSpec(), 1) for each in (CASES["normal"], after))
    assert not torch.equal(first.dispatch[:22], second.dispatch[:22])  # not causal, as the table says
    assert torch.equal(first.combine[:22], second.combine[:22])
