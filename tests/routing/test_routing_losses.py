"""Losses: against loops, their gradients against finite differences, where they are least, what leaves them alone."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from time import perf_counter

import losses_by_hand as by_hand
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moebench.catalogue.losses import LOSSES
from moebench.routing import losses

T, E, K, DEVICES, LIMIT, SEQUENCE = 12, 6, 2, 3, 2, 4
DTYPES = [torch.float64, torch.float32]
Given = dict[str, Tensor]


def draw(seed: int = 0, dtype: torch.dtype = torch.float64, tokens: int = T, unwanted: float = 0.0) -> Given:
    """One routing: logits, softmax probabilities, top-K ids, noisy logits, gates, modalities."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, E, generator=generator, dtype=torch.float64) * 2
    noise_std = torch.rand(tokens, E, generator=generator, dtype=torch.float64) + 0.3
    noisy = logits + noise_std * torch.randn(tokens, E, generator=generator, dtype=torch.float64)
    probs = logits.softmax(dim=1)
    ids = probs.topk(K, dim=1).indices
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < unwanted, -1)
    floats = {
        "logits": logits,
        "probs": probs,
        "noisy": noisy,
        "noise_std": noise_std,
        "gates": losses.dense(noisy.topk(K, dim=1).indices, noisy.topk(K, dim=1).values.softmax(dim=1), E),
        "scores": logits.sigmoid(),
        "weights": torch.randn(E, 3, 2, generator=generator, dtype=torch.float64),
        "gate": torch.rand(tokens, generator=generator, dtype=torch.float64),
    }
    modality = torch.randint(0, 2, (tokens,), generator=generator)
    return {name: value.to(dtype) for name, value in floats.items()} | {"ids": ids, "modality": modality}


def sequences(loss: Callable[..., float], probs: Tensor, ids: Tensor, *more: int) -> float:
    """The mean of a loop's loss over the sequences."""
    parts = zip(probs.split(SEQUENCE), ids.split(SEQUENCE), strict=True)
    values = [loss(p.tolist(), i.tolist(), *more) for p, i in parts]
    return sum(values) / len(values)


# name -> (what is differentiated, the loss of it, the loop)
Case = tuple[str, Callable[[Tensor, Given], Tensor], Callable[[Given], float]]
CASES: dict[str, Case] = {
    "switch": ("probs", lambda p, g: losses.switch(p, g["ids"]),
               lambda g: by_hand.switch(g["probs"].tolist(), g["ids"].tolist())),
    "switch by sequence": ("probs", lambda p, g: losses.switch(p, g["ids"], SEQUENCE),
                           lambda g: sequences(by_hand.switch, g["probs"], g["ids"])),
    "sequence_level": ("scores", lambda s, g: losses.sequence_level(s, g["ids"], SEQUENCE),
                       lambda g: by_hand.sequence_level(g["scores"].tolist(), g["ids"].tolist(), SEQUENCE)),
    "gshard": ("probs", lambda p, g: losses.gshard(p, g["ids"]),
               lambda g: by_hand.gshard(g["probs"].tolist(), g["ids"].tolist())),
    "gshard by group": ("probs", lambda p, g: losses.gshard(p, g["ids"], SEQUENCE),
                        lambda g: sequences(by_hand.gshard, g["probs"], g["ids"])),
    "device_level": ("probs", lambda p, g: losses.device_level(p, g["ids"], DEVICES),
                     lambda g: by_hand.device_level(g["probs"].tolist(), g["ids"].tolist(), DEVICES)),
    "device_level by sequence": ("probs", lambda p, g: losses.device_level(p, g["ids"], DEVICES, SEQUENCE),
                                 lambda g: sequences(by_hand.device_level, g["probs"], g["ids"], DEVICES)),
    "communication": ("probs", lambda p, g: losses.communication(p, g["ids"], DEVICES, LIMIT),
                      lambda g: by_hand.communication(g["probs"].tolist(), g["ids"].tolist(), DEVICES, LIMIT)),
    "communication by sequence": (
        "probs", lambda p, g: losses.communication(p, g["ids"], DEVICES, LIMIT, SEQUENCE),
        lambda g: sequences(by_hand.communication, g["probs"], g["ids"], DEVICES, LIMIT)),
    "importance": ("gates", lambda x, g: losses.importance(x),
                   lambda g: by_hand.cv_squared([sum(column) for column in zip(*g["gates"].tolist(), strict=True)])),
    "load": ("logits", lambda z, g: losses.load(z, g["noisy"], g["noise_std"], K), lambda g: by_hand.load(
        g["logits"].tolist(), g["noisy"].tolist(), g["noise_std"].tolist(), K, True)),
    "load over the noisy logits": (
        "noisy", lambda h, g: losses.load(g["logits"], h, g["noise_std"], K), lambda g: by_hand.load(
            g["logits"].tolist(), g["noisy"].tolist(), g["noise_std"].tolist(), K, True)),
    "load over the noise": (
        "noise_std", lambda s, g: losses.load(g["logits"], g["noisy"], s, K), lambda g: by_hand.load(
            g["logits"].tolist(), g["noisy"].tolist(), g["noise_std"].tolist(), K, True)),
    "load of V-MoE": ("logits", lambda z, g: losses.load(z, g["noisy"], 1 / E, K, of_others=False),
                      lambda g: by_hand.load(g["logits"].tolist(), g["noisy"].tolist(), [[1 / E] * E] * T, K, False)),
    "router_z": ("logits", lambda z, g: losses.router_z(z), lambda g: by_hand.router_z(g["logits"].tolist())),
    "local_entropy": ("probs", lambda p, g: losses.local_entropy(p),
                      lambda g: sum(by_hand.entropy(row) for row in g["probs"].tolist()) / T),
    "global_entropy": ("probs", lambda p, g: losses.global_entropy(p),
                       lambda g: by_hand.global_entropy(g["probs"].tolist(), None)),
    "global_entropy with a soft minimum": ("probs", lambda p, g: losses.global_entropy(p, least_experts=5.9),
                                           lambda g: by_hand.global_entropy(g["probs"].tolist(), 5.9)),
    "orthogonality": ("weights", lambda w, g: losses.orthogonality(w),
                      lambda g: by_hand.orthogonality(g["weights"].flatten(1).tolist())),
    "cmr_gate": ("gate", lambda x, g: losses.cmr_gate(x, 0.8),
                 lambda g: abs(sum(g["gate"].tolist()) / T - 0.8)),
}  # fmt: skip
BALANCING = ["switch", "switch by sequence", "sequence_level", "gshard", "gshard by group"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_against_loops(name: str, dtype: torch.dtype) -> None:
    wrt, loss, loop = CASES[name]
    for seed in range(4):
        given_ = draw(seed, dtype)
        found = loss(given_[wrt], given_)
        assert found.dtype == dtype
        assert found.shape == ()
        assert found.item() == pytest.approx(loop(given_), rel=1e-12 if dtype == torch.float64 else 2e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["switch", "switch by sequence", "sequence_level"])
def test_what_is_not_wanted_counts_nowhere(name: str) -> None:
    wrt, loss, loop = CASES[name]
    for seed in range(4):
        given_ = draw(seed, unwanted=0.3)
        assert loss(given_[wrt], given_).item() == pytest.approx(loop(given_), rel=1e-12)


@pytest.mark.parametrize("name", [*BALANCING, "device_level", "communication"])
def test_nothing_wanted_costs_nothing(name: str) -> None:
    wrt, loss, _ = CASES[name]
    nothing = draw(0, unwanted=2.0)
    assert bool((nothing["ids"] < 0).all())
    assert loss(nothing[wrt], nothing).item() == 0


@pytest.mark.parametrize("name", CASES)
def test_gradients_against_finite_differences(name: str) -> None:
    wrt, loss, _ = CASES[name]
    given_ = draw(1)
    value = given_[wrt].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: loss(v, given_), (value,))
    (gradient,) = torch.autograd.grad(loss(value, given_), value)
    assert float(gradient.abs().max()) > 0  # it does push somewhere


def uniform(tokens: int = T) -> tuple[Tensor, Tensor]:
    """Every expert as probable as the others, and as often picked, in each sequence."""
    ids = (torch.arange(tokens * K).view(tokens, K)) % E
    return torch.full((tokens, E), 1 / E, dtype=torch.float64), ids


def test_values_at_uniform_routing() -> None:
    probs, ids = uniform()
    first = torch.arange(T)[:, None] % E
    assert losses.switch(probs, ids).item() == pytest.approx(1)
    assert losses.switch(probs, ids, 3).item() == pytest.approx(1)
    for scale in (7, 0.01):
        assert losses.sequence_level(probs * scale, ids, 3).item() == pytest.approx(1)
    assert losses.gshard(probs, first).item() == pytest.approx(1 / E**2)
    assert losses.device_level(probs, ids, DEVICES).item() == pytest.approx(1)
    two_apart = torch.stack([torch.arange(T) % E, (torch.arange(T) + 2) % E], dim=1)  # two of three devices a token
    assert losses.communication(probs, two_apart, DEVICES, 2).item() == pytest.approx(1)
    assert losses.importance(probs).item() == pytest.approx(0, abs=1e-20)
    assert losses.load(probs * 0, probs * 0, 1.0, K).item() == pytest.approx(0, abs=1e-20)
    assert losses.router_z(probs * 0).item() == pytest.approx(math.log(E) ** 2)
    assert losses.router_z(probs.log()).item() == pytest.approx(0, abs=1e-20)
    assert losses.global_entropy(probs).item() == pytest.approx(-math.log(E))
    assert losses.local_entropy(probs).item() == pytest.approx(math.log(E))
    assert losses.local_entropy(torch.eye(E)).item() == 0
    assert losses.cmr_gate(torch.full((T,), 0.25), 0.25).item() == 0


def test_values_where_all_goes_to_one_expert() -> None:
    probs = torch.zeros(T, E, dtype=torch.float64)
    probs[:, 2] = 1
    ids = torch.full((T, 1), 2)
    assert losses.switch(probs, ids).item() == E
    assert losses.gshard(probs, ids).item() == pytest.approx(1 / E)
    assert losses.device_level(probs, ids, DEVICES).item() == pytest.approx(DEVICES)
    assert losses.communication(probs, ids, DEVICES, 1).item() == pytest.approx(DEVICES)
    assert losses.importance(probs).item() == pytest.approx(E - 1)
    assert losses.global_entropy(probs).item() == 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_no_routing_is_below_the_minimum(seed: int) -> None:
    """Where the published minimum is a bound for whatever routing."""
    given_ = draw(seed)
    assert losses.importance(given_["gates"]).item() >= 0
    assert losses.load(given_["logits"], given_["noisy"], given_["noise_std"], K).item() >= 0
    assert losses.global_entropy(given_["probs"]).item() >= -math.log(E) - 1e-12
    assert losses.local_entropy(given_["probs"]).item() >= 0
    assert losses.router_z(given_["logits"]).item() >= 0
    assert 0 <= losses.orthogonality(given_["weights"]).item() <= 1
    # Chebyshev's sum inequality: where f rises with P their product is at least that of the means.
    f, P = losses.balance_fractions(given_["probs"], given_["ids"])
    assert losses.switch_of(f.sort().values, P.sort().values).item() >= 1 - 1e-12


def test_switch_can_be_below_one() -> None:
    """The picks of unsure tokens lie elsewhere than the probability of a sure one."""
    probs = torch.tensor([[0.51, 0.49], [0.51, 0.49], [0.0, 1.0]], dtype=torch.float64)
    ids = probs.argmax(dim=1, keepdim=True)
    assert losses.switch(probs, ids).item() == pytest.approx(0.8933333333)


@pytest.mark.parametrize("name", CASES)
def test_tokens_may_change_places(name: str) -> None:
    """All but the losses by sequence; those for whole sequences."""
    wrt, loss, _ = CASES[name]
    given_ = draw(2)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(5))
    if "sequence" in name or "group" in name:
        order = torch.arange(T).view(-1, SEQUENCE)[[2, 0, 1]].flatten()
    moved = {key: value if key == "weights" else value[order] for key, value in given_.items()}
    assert loss(moved[wrt], moved).item() == pytest.approx(loss(given_[wrt], given_).item(), rel=1e-12)


@pytest.mark.parametrize("name", [*BALANCING, "importance", "load", "router_z", "local_entropy", "global_entropy"])
def test_experts_may_change_names(name: str) -> None:
    wrt, loss, _ = CASES[name]
    given_ = draw(3)
    names = torch.randperm(E, generator=torch.Generator().manual_seed(6))
    renamed = {key: value[:, names.argsort()] if value.shape == (T, E) else value for key, value in given_.items()}
    renamed["ids"] = names[given_["ids"]]
    assert loss(renamed[wrt], renamed).item() == pytest.approx(loss(given_[wrt], given_).item(), rel=1e-12)


def test_global_batch_by_averaging_micro_batches() -> None:
    """f and P averaged over equal micro-batches are those of all; the loss of each, averaged, is not."""
    given_ = draw(4, tokens=24)
    probs, ids = given_["probs"], given_["ids"]
    parts = [losses.balance_fractions(p, i) for p, i in zip(probs.split(6), ids.split(6), strict=True)]
    f, P = (torch.stack(values).mean(dim=0) for values in zip(*parts, strict=True))
    whole = losses.switch(probs, ids).item()
    assert losses.switch_of(f, P).item() == pytest.approx(whole, rel=1e-12)
    assert abs(losses.switch(probs, ids, 6).item() - whole) > 1e-3
    by_sequence = losses.balance_fractions(probs, ids, 6)
    assert torch.allclose(by_sequence[0], torch.stack([part[0] for part in parts]))
    assert torch.allclose(by_sequence[1], torch.stack([part[1] for part in parts]))
    sums = sum(gates.sum(dim=0) for gates in given_["gates"].split(6))
    assert isinstance(sums, Tensor)
    assert losses.cv_squared(sums).item() == pytest.approx(losses.importance(given_["gates"]).item(), rel=1e-12)


def test_load_says_how_likely_it_is_to_be_chosen_again() -> None:
    """Against redrawing each expert's own noise many times, the others' noise held."""
    given_ = draw(5, tokens=3)
    clean, noisy, std = given_["logits"], given_["noisy"], given_["noise_std"]
    P = losses.chosen_probability(clean, noisy, std, K)
    generator = torch.Generator().manual_seed(1)
    for token in range(3):
        for expert in range(E):
            again = noisy[token].expand(20_000, E).clone()
            again[:, expert] = clean[token, expert] + std[token, expert] * torch.randn(
                20_000, generator=generator, dtype=torch.float64
            )
            seen = (again.topk(K, dim=1).indices == expert).any(dim=1).double().mean()
            assert float((P[token, expert] - seen).abs()) < 0.02


def test_load_where_all_are_chosen_or_tied() -> None:
    z = torch.zeros(4, 3, requires_grad=True)
    assert losses.load(z, z, 0.1, 3).item() == 0
    tied = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert losses.chosen_probability(tied, tied, 1.0, 2)[0, :3].tolist() == [0.5] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_and_infinite_logits_stay_finite(dtype: torch.dtype) -> None:
    z = torch.tensor([[1e30, 0, -1e30, -torch.inf], [-torch.inf] * 4, [0, 0, 0, 0]], dtype=dtype)
    for top_k in (1, 2, 3):
        for std in (1.0, 0.0, torch.zeros(3, 4)):
            P = losses.chosen_probability(z, z, std, top_k)
            assert bool(((P >= 0) & (P <= 1)).all())
            assert math.isfinite(losses.load(z, z, std, top_k).item())


@pytest.mark.parametrize("loss", [losses.local_entropy, losses.global_entropy])
def test_entropy_of_a_zero_probability_has_a_finite_gradient(loss: Callable[[Tensor], Tensor]) -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0], [200.0, -torch.inf, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(logits.softmax(dim=1)), logits)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("least", [None, 5.5])
def test_entropies_by_modality_are_those_of_its_tokens(least: float | None) -> None:
    given_ = draw(6)
    probs, modality = given_["probs"], given_["modality"]
    local = losses.local_entropy(probs, modality, 3)
    spread = losses.global_entropy(probs, modality, 3, least_experts=least)
    assert local.shape == spread.shape == (3,)
    for which in (0, 1):
        mine = probs[modality == which]
        assert len(mine) > 1
        assert local[which].item() == pytest.approx(losses.local_entropy(mine).item(), rel=1e-12)
        expected = losses.global_entropy(mine, least_experts=least).item()
        assert spread[which].item() == pytest.approx(expected, rel=1e-12)
    assert (local[2].item(), spread[2].item()) == (0, 0)  # no token is of it


def test_a_soft_minimum_asks_for_no_more_experts() -> None:
    probs = torch.zeros(6, 6, dtype=torch.float64)
    probs[:, :3] = torch.eye(3).double().repeat(2, 1)
    assert losses.global_entropy(probs, least_experts=3).item() == pytest.approx(0, abs=1e-12)
    assert losses.global_entropy(probs, least_experts=2).item() == 0
    assert losses.global_entropy(probs, least_experts=4).item() == pytest.approx(math.log(4 / 3))


def test_orthogonality_sees_directions_alone() -> None:
    weights = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([1.0, -2.0, 0.1, 30.0])[:, None, None]
    expected = losses.orthogonality(weights).item()
    assert losses.orthogonality(weights * scales).item() == pytest.approx(expected, rel=1e-5)
    assert losses.orthogonality(torch.eye(4)).item() == 0
    assert losses.orthogonality(weights[:1].repeat(4, 1, 1)).item() == pytest.approx(1)
    assert losses.orthogonality(weights[:1]).item() == pytest.approx(0, abs=1e-6)


def test_bias_update_moves_by_the_sign_of_the_missing_load() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5, 0.25], dtype=torch.float64)
    moved = losses.update_bias(bias, torch.tensor([10, 0, 5, 5]))
    assert (moved - bias).tolist() == pytest.approx([-0.001, 0.001, 0, 0])
    assert torch.equal(losses.update_bias(bias, torch.full((4,), 7)), bias)
    assert losses.update_bias(bias, torch.tensor([3, 0, 0, 0]), 0.1)[0].item() == pytest.approx(0.4)


def test_bias_updates_balance_a_skewed_router() -> None:
    """Chosen by score + bias, updated each step: the load evens out, which it does not without."""
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(512, 8, generator=generator) + torch.arange(8) / 4).sigmoid()
    bias = torch.zeros(8)

    def counts() -> Tensor:
        return torch.bincount((scores + bias).topk(2, dim=1).indices.flatten(), minlength=8)

    before = float(counts().max()) / 128
    for _ in range(1000):
        bias = losses.update_bias(bias, counts())
    assert before > 1.8
    assert float(counts().max()) / 128 < 1.05


def test_faults_are_one_line() -> None:
    given_ = draw(0)
    with pytest.raises(ValueError, match="12 tokens are not a whole number of sequences of 5"):
        losses.switch(given_["probs"], given_["ids"], 5)
    for loss in (losses.device_level, lambda *x: losses.communication(*x, 2)):
        for devices in (0, 4, 7):
            with pytest.raises(ValueError, match=f"6 experts do not divide among {devices} devices"):
                loss(given_["probs"], given_["ids"], devices)


def test_dense_puts_weights_at_their_experts() -> None:
    weights = torch.tensor([[0.6, 0.4], [1.0, 5.0]], requires_grad=True)
    found = losses.dense(torch.tensor([[2, 0], [1, -1]]), weights, 3)
    assert found.tolist() == [[pytest.approx(0.4), 0, pytest.approx(0.6)], [0, 1, 0]]
    found.sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[1, 1], [1, 0]]


def test_every_row_of_the_catalogue_has_its_function() -> None:
    for name, info in LOSSES.items():
        module, function = info.function.split(":")
        assert callable(getattr(importlib.import_module(f"moebench.routing.{module}"), function)), name
        assert info.scope in ("micro-batch", "group", "sequence", "weights")
        assert all((info.formula, info.source, info.minimum))
        assert info.weight is None or 0 < info.weight < 1
    listed = {info.function.split(":")[1] for info in LOSSES.values()}
    assert {name.split(" ")[0] for name in CASES} == listed  # each is tested above


def test_scales() -> None:
    """T 131,072, K 8, E 1,024: nothing is done token by token."""
    probs = torch.full((131_072, 1024), 1 / 1024)
    ids = torch.arange(131_072 * 8).view(-1, 8) * 7 % 1024
    began = perf_counter()
    assert losses.switch(probs, ids, 4096).item() == pytest.approx(1, rel=1e-4)
    assert losses.communication(probs, ids, 64, 8).item() <= 1.001
    assert perf_counter() - began < 20
