"""What the papers promise of each form, on layers where it can be seen."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from form_cases import TRAINING, error, layers_of, plain_moe, tokens_of, weights_of
from torch import Tensor

from moebench import oracle
from moebench.catalogue.layer_forms import depth_tokens, peer_sizes, width_classes
from moebench.catalogue.spec import LayerSpec
from moebench.layer_forms import depths, hetero, hyper, lora, moh, multihead, peer, smear

LAYER = LayerSpec(32, 16, 8, 2)


def one_hot(layer: LayerSpec, x: Tensor, expert: int) -> Tensor:
    """A router that gives this expert all of the mean token."""
    router = torch.zeros(layer.routed_experts, layer.hidden_size, dtype=x.dtype)
    router[expert] = 1000 * torch.nn.functional.layer_norm(x.mean(0), (layer.hidden_size,))
    return router


@pytest.mark.parametrize("expert", [0, 5])
def test_smear_that_is_sure_is_one_expert(expert: int) -> None:
    x, weights = tokens_of(LAYER, 20), weights_of("smear", LAYER)
    weights["router"] = one_hot(LAYER, x, expert)
    expected = oracle.ffn(LAYER, x, weights["w_in"][expert], weights["w_down"][expert])
    assert error(smear.forward(LAYER, weights, x), expected) < 1e-12


def test_smear_mixes_parameters_not_outputs() -> None:
    x, weights = tokens_of(LAYER, 20), weights_of("smear", LAYER)
    weights["router"].zero_()
    y = smear.forward(LAYER, weights, x)
    assert error(y, oracle.ffn(LAYER, x, weights["w_in"].mean(0), weights["w_down"].mean(0))) < 1e-12
    outputs = [oracle.ffn(LAYER, x, *pair) for pair in zip(weights["w_in"], weights["w_down"], strict=True)]
    assert error(y, torch.stack(outputs).mean(0)) > 0.1


def test_smear_routes_each_sequence_alone() -> None:
    x, weights = tokens_of(LAYER, 24), weights_of("smear", LAYER)
    apart = torch.cat([smear.forward(LAYER, weights, part) for part in x.split(8)])
    assert error(smear.forward(LAYER, weights, x, tokens_per_sequence=8), apart) < 1e-13
    assert error(smear.forward(LAYER, weights, x), apart) > 0.01
    with pytest.raises(ValueError, match="24 tokens are not whole sequences of 7"):
        smear.forward(LAYER, weights, x, tokens_per_sequence=7)


def test_smear_leaves_experts_out_in_training() -> None:
    x, weights = tokens_of(LAYER, 20), weights_of("smear", LAYER)
    noise = torch.full((1, 8), 0.05, dtype=torch.float64)
    noise[0, [1, 6]] = 0.5
    p = smear.mixture(weights["router"], x.unsqueeze(0))[0]
    kept = {e: p[e] / (p[1] + p[6]) for e in (1, 6)}
    merged = [sum(share * weights[name][e] for e, share in kept.items()) for name in ("w_in", "w_down")]
    assert error(smear.forward(LAYER, weights, x, dropout=0.1, noise=noise), oracle.ffn(LAYER, x, *merged)) < 1e-12
    just_in = smear.forward(LAYER, weights, x, dropout=0.5, noise=noise)
    assert error(just_in, oracle.ffn(LAYER, x, *merged)) < 1e-12
    everyone = [weights[name].mean(0) for name in ("w_in", "w_down")]
    none_left = smear.forward(LAYER, weights, x, dropout=0.9, noise=noise)
    assert error(none_left, oracle.ffn(LAYER, x, *everyone)) < 1e-12
    with pytest.raises(ValueError, match="needs noise"):
        smear.forward(LAYER, weights, x, dropout=0.1)


@pytest.mark.parametrize(("tokens", "computed"), [(1, 1), (4, 1), (8, 1), (12, 2), (20, 2), (64, 8), (1000, 125)])
def test_depths_in_training_change_exactly_c_tokens(tokens: int, computed: int) -> None:
    layer = replace(LAYER, router=TRAINING)
    x, weights = tokens_of(layer, tokens), weights_of("mixture-of-depths", layer)
    y = depths.forward(layer, weights, x)
    changed = (y != x).any(1)
    assert int(changed.sum()) == computed == depth_tokens(tokens)
    r = x @ weights["router"]
    assert r[changed].min() >= r[~changed].max() if tokens > 1 else True
    expected = x[changed] + r[changed].unsqueeze(1) * oracle.ffn(layer, x[changed], weights["w_in"], weights["w_down"])
    assert error(y[changed], expected) < 1e-13


def test_depths_in_inference_follow_the_predictor() -> None:
    x, weights = tokens_of(LAYER, 4096), weights_of("mixture-of-depths", LAYER)
    weights["predictor"] /= weights["predictor"].norm()
    passing = torch.sigmoid(x @ weights["predictor"] + weights["threshold"]) > 0.5
    y = depths.forward(LAYER, weights, x)
    assert torch.equal((y != x).any(1), passing)
    assert float(passing.double().mean()) == pytest.approx(0.125, abs=0.02)
    one_by_one = torch.cat([depths.forward(LAYER, weights, token.unsqueeze(0)) for token in x[:50]])
    assert error(y[:50], one_by_one) < 1e-13


def test_depths_take_a_prediction_a_rounding_from_zero_as_the_form_did() -> None:
    layer, x = LAYER, tokens_of(LAYER, 9)
    weights = weights_of("mixture-of-depths", layer)
    weights["threshold"] = -(x[4] @ weights["predictor"]).reshape(1) - 1e-9
    with_it = torch.cat([depths.choices(layer, weights, x), torch.tensor([4])])
    assert not torch.equal(depths.reference(layer, weights, x, with_it)[4], x[4])
    assert torch.equal(depths.reference(layer, weights, x)[4], x[4])


def attention(x: Tensor, weights: dict[str, Tensor], heads: int) -> list[Tensor]:
    """What each head adds to the output, by loops over tokens."""
    parts, d = [], x.shape[1] // heads
    for head in range(heads):
        rows = slice(head * d, (head + 1) * d)
        q, k, v = (x @ w[rows].T for w in weights["w_qkv"])
        out = [torch.softmax(k[: t + 1] @ q[t] / d**0.5, 0) @ v[: t + 1] for t in range(len(x))]
        parts.append(torch.stack(out) @ weights["w_out"][:, rows].T)
    return parts


@pytest.mark.parametrize("shared", [0, 4])
def test_moh_with_all_heads_alike_is_plain_attention(shared: int) -> None:
    more = {"shared_experts": shared, "shared_ffn_size": 4, "shared_combine": "add"} if shared else {}
    layer = LayerSpec(32, 16, 8 - shared, 8 - shared, **more)
    x, weights = tokens_of(layer, 30), weights_of("moh", layer)
    for name in ("router", "shared_router", "mixer"):
        if name in weights:
            weights[name].zero_()
    assert error(moh.forward(layer, weights, x), sum(attention(x, weights, 8))) < 1e-13


def test_moh_weighs_every_head_by_its_softmaxes() -> None:
    layer = layers_of("moh")[1]
    x, weights = tokens_of(layer, 25), weights_of("moh", layer)
    S, E, K = 2, 4, 2
    y = torch.zeros_like(x)
    parts = attention(x, weights, S + E)
    for t, token in enumerate(x):
        a = 2 * torch.softmax(weights["mixer"] @ token, 0)
        shared = S * torch.softmax(weights["shared_router"] @ token, 0)
        p = torch.softmax(weights["router"] @ token, 0)
        best = p.argsort(descending=True)[:K].tolist()
        for head in range(S):
            y[t] += a[0] * shared[head] * parts[head][t]
        for head in best:
            y[t] += a[1] * K * p[head] / p[best].sum() * parts[S + head][t]
    assert error(moh.forward(layer, weights, x), y) < 1e-13


@pytest.mark.parametrize("layer", layers_of("peer"))
def test_peer_finds_the_best_of_all_n(layer: LayerSpec) -> None:
    x, weights = tokens_of(layer, 30), weights_of("peer", layer)
    heads, k, keys, half = peer_sizes(layer)
    ids = peer.choices(layer, weights, x)
    query = (x @ weights["query"].T).view(len(x), 2, heads, half)
    first, second = weights["keys"]
    every = [(e, first[e // keys], second[e % keys]) for e in range(layer.routed_experts)]
    y = torch.zeros_like(x)
    act = {"gelu": torch.nn.functional.gelu, "relu": torch.relu, "silu": torch.nn.functional.silu}[layer.activation]
    for t in range(len(x)):
        for head in range(heads):
            q1, q2 = query[t, :, head]
            scores = torch.stack([q1 @ one + q2 @ two for _, one, two in every])
            best = scores.topk(k)
            assert best.indices.tolist() == ids[t, head].tolist()
            for gate, e in zip(torch.softmax(best.values, 0), best.indices, strict=True):
                y[t] += gate * act(weights["down"][e] @ x[t]) * weights["up"][e]
    assert error(peer.forward(layer, weights, x), y) < 1e-13


def test_peer_of_a_million_experts() -> None:
    layer = LayerSpec(8, 1, 1024**2, 128, activation="gelu")
    start = time.perf_counter()
    weights, x = weights_of("peer", layer, torch.float32), tokens_of(layer, 64, torch.float32)
    y = peer.forward(layer, weights, x)
    expected = peer.reference(layer, weights, x.double(), peer.choices(layer, weights, x))
    assert time.perf_counter() - start < 3
    assert error(y, expected) < 2e-6
    few = {name: value.double() if name in ("query", "keys") else value for name, value in weights.items()}
    scores = peer.half_scores(layer, few, x[:1].double())[:, 0]
    sums = (scores[0].unsqueeze(-1) + scores[1].unsqueeze(-2)).flatten(1)
    found = peer.choices(layer, few, x[:1].double())[0]
    assert torch.equal(sums.topk(16).indices, found)


def test_peer_takes_ties_as_the_form_did_but_no_expert_twice() -> None:
    layer = layers_of("peer")[0]
    weights, x = weights_of("peer", layer), tokens_of(layer, 3)
    weights["keys"].zero_()
    tied = torch.tensor([[40, 7]]).expand(3, 8, 2)
    rows = torch.nn.functional.gelu(x @ weights["down"][[40, 7]].T) / 2 @ weights["up"][[40, 7]]
    assert error(peer.reference(layer, weights, x, tied), 8 * rows) < 1e-13
    twice = torch.tensor([[40, 40]]).expand(3, 8, 2)
    assert torch.equal(peer.reference(layer, weights, x, twice), peer.reference(layer, weights, x))


def test_peer_in_parts_of_a_batch_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layers_of("peer")[0]
    weights, x = weights_of("peer", layer), tokens_of(layer, 30)
    whole = peer.forward(layer, weights, x)
    monkeypatch.setattr(peer, "GATHERED", 7 * layer.top_k * layer.hidden_size)
    assert torch.allclose(peer.forward(layer, weights, x), whole, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("silenced", ["generate_in", "generate_out"])
def test_hyper_without_its_hypernetwork_is_a_plain_moe(silenced: str) -> None:
    for layer in layers_of("hyper-moe"):
        x, weights = tokens_of(layer, 30), weights_of("hyper-moe", layer)
        plain = plain_moe(layer, x, weights["router"], weights["w_in"], weights["w_down"])
        assert error(hyper.forward(layer, weights, x), plain) > 0.01
        weights[silenced].zero_()
        assert error(hyper.forward(layer, weights, x), plain) < 1e-13


def test_hyper_hears_the_experts_not_chosen_and_them_alone() -> None:
    x, weights = tokens_of(LAYER, 1), weights_of("hyper-moe", LAYER)
    chosen = hyper.choices(LAYER, weights, x)[0].tolist()
    before = hyper.forward(LAYER, weights, x)
    for expert in range(LAYER.routed_experts):
        moved = weights | {"embeddings": weights["embeddings"].clone()}
        moved["embeddings"][expert] += 1
        assert torch.allclose(hyper.forward(LAYER, moved, x), before, rtol=1e-12) == (expert in chosen)


def test_multihead_of_one_head_is_a_plain_moe() -> None:
    x, draw = tokens_of(LAYER, 30), weights_of("hyper-moe", LAYER)
    bank = {name: draw[name] for name in ("router", "w_in", "w_down")}
    weights = bank | {name: torch.eye(32, dtype=torch.float64) for name in ("heads", "merge")}
    assert error(multihead.forward(LAYER, weights, x), plain_moe(LAYER, x, *bank.values())) < 1e-13


def test_multihead_routes_every_part_of_a_token() -> None:
    x, weights = tokens_of(LAYER, 11), weights_of("multi-head-moe", LAYER)
    parts = (x @ weights["heads"].T).split(8, dim=1)
    bank = [weights[name] for name in ("router", "w_in", "w_down")]
    out = torch.cat([plain_moe(LAYER, part, *bank) for part in parts], dim=1)
    assert error(multihead.forward(LAYER, weights, x), out @ weights["merge"].T) < 1e-13


def test_lora_without_b_is_the_frozen_ffn() -> None:
    for layer in layers_of("lora-moe"):
        x, weights = tokens_of(layer, 30), weights_of("lora-moe", layer)
        w_in = torch.cat([weights[f"frozen_{name}"] for name in ("gate", "up") if f"frozen_{name}" in weights])
        frozen = oracle.ffn(layer, x, w_in, weights["frozen_down"])
        assert error(lora.forward(layer, weights, x), frozen) > 0.01
        for name in weights:
            if name.startswith("b_"):
                weights[name].zero_()
        assert error(lora.forward(layer, weights, x), frozen) < 1e-13


def test_lora_of_one_expert_merges_into_its_maps() -> None:
    layer = LayerSpec(32, 16, 1, 1)
    x, weights = tokens_of(layer, 30), weights_of("lora-moe", layer)
    full = {n: weights[f"frozen_{n}"] + 8 * weights[f"b_{n}"][0] @ weights[f"a_{n}"][0] for n in ("gate", "up", "down")}
    merged = oracle.ffn(layer, x, torch.cat([full["gate"], full["up"]]), full["down"])
    assert error(lora.forward(layer, weights, x), merged) < 1e-13


def test_hetero_of_equal_widths_is_a_plain_moe() -> None:
    x, draw = tokens_of(LAYER, 30), weights_of("hyper-moe", LAYER)
    weights = {"router": draw["router"]}
    for index, part in enumerate((slice(0, 3), slice(3, 4), slice(4, 8))):
        weights |= {f"{name}_{index}": draw[name][part] for name in ("w_in", "w_down")}
    plain = plain_moe(LAYER, x, draw["router"], draw["w_in"], draw["w_down"])
    assert error(hetero.forward(LAYER, weights, x), plain) < 1e-13


def test_hetero_experts_keep_their_own_widths() -> None:
    for layer in layers_of("hetero-moe"):
        x, weights = tokens_of(layer, 30), weights_of("hetero-moe", layer)
        stacks = {name: [e for c in range(3) for e in weights.get(f"{name}_{c}", ())] for name in ("w_in", "w_down")}
        assert len({w.shape for w in stacks["w_down"]}) > 1
        plain = plain_moe(layer, x, weights["router"], stacks["w_in"], stacks["w_down"])
        assert error(hetero.forward(layer, weights, x), plain) < 1e-13


@pytest.mark.parametrize(("experts", "ffn"), [(2, 2), (3, 7), (8, 16), (9, 5), (64, 1408)])
def test_hetero_widths_add_up_to_those_of_the_layer(experts: int, ffn: int) -> None:
    classes = width_classes(LayerSpec(8, ffn, experts, 1))
    assert sum(count for count, _ in classes) == experts
    assert sum(count * width for count, width in classes) == experts * ffn
    assert [width for _, width in classes] == sorted({width for _, width in classes})
