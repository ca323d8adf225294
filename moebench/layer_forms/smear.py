"""SMEAR, soft merging of experts (Muqeeth et al., arXiv 2306.03745): mix parameters, not outputs.

    p = softmax(R norm(mean_t x_t))         once a sequence, over all E experts
    theta = sum_e p_e theta_e               one FFN of width F
    y_t = f_theta(x_t)

x [T, D]; R [E, D]; w_in [E, m*F, D]; w_down [E, D, F]. norm is a layer norm without parameters, as the authors' code
normalises what its router sees: a mean of many tokens is small. Top_k plays no part. Not causal: the mean sees all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moebench import oracle
from moebench.catalogue.spec import LayerSpec
from moebench.layer_forms.bank import Weights, doubled, drawer, ffn, wide

NORM_EPS = 1e-5


def make_weights(
    layer: LayerSpec, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Weights:
    """router [E, D], w_in [E, m*F, D], w_down [E, D, F]."""
    D, F_, E, m = layer.hidden_size, layer.expert_ffn_size, layer.routed_experts, 2 if layer.gated else 1
    draw = drawer(generator, dtype, device)
    return {"router": draw(E, D), "w_in": draw(E, m * F_, D), "w_down": draw(E, D, F_)}


def choices(layer: LayerSpec, weights: Weights, x: Tensor) -> None:
    """Every expert takes part."""


def forward(
    layer: LayerSpec, weights: Weights, x: Tensor, tokens_per_sequence: int | None = None, *,
    dropout: float = 0.0, noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [T, D] -> y [T, D].

    Args:
        tokens_per_sequence: the batch is sequences of so many tokens; None: it is one.
        dropout: share of experts left out in training; those left share their weight. All out: all alike.
        noise: uniform (0, 1) [sequences, E], needed by dropout: an expert whose value is below `dropout` is out.

    Raises:
        ValueError: sequences do not fill the batch, or dropout lacks its noise.
    """
    length = len(x) if tokens_per_sequence is None else tokens_per_sequence
    if length < 1 or len(x) % length:
        raise ValueError(f"{len(x)} tokens are not whole sequences of {length}")
    sequences = x.unflatten(0, (-1, length))
    p = mixture(weights["router"], sequences)
    if dropout:
        if noise is None:
            raise ValueError("expert dropout needs noise, uniform in (0, 1), of shape [sequences, experts]")
        p = _drop(p, noise >= dropout)
    w_in, w_down = (_merge(p, weights[name]) for name in ("w_in", "w_down"))
    return ffn(layer, sequences, w_in, w_down).flatten(0, 1)


def mixture(router: Tensor, sequences: Tensor) -> Tensor:
    """[S, t, D] -> p [S, E], at least float32."""
    mean = wide(sequences).mean(1)
    return (F.layer_norm(mean, mean.shape[-1:], eps=NORM_EPS) @ wide(router).T).softmax(-1)


def reference(layer: LayerSpec, weights: Weights, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """x float64 [T, D], one sequence -> y float64 [T, D]."""
    weights = doubled(weights)
    mean = x.mean(0)
    centred = mean - mean.mean()
    logits = weights["router"] @ (centred / (centred.square().mean() + NORM_EPS).sqrt())
    merged = {name: torch.zeros_like(weights[name][0]) for name in ("w_in", "w_down")}
    for expert, p in enumerate(torch.softmax(logits, 0)):
        for name, total in merged.items():
            total += p * weights[name][expert]
    return oracle.ffn(layer, x, merged["w_in"], merged["w_down"])


def _merge(p: Tensor, stack: Tensor) -> Tensor:
    """p [S, E], stack [E, O, I] -> [S, O, I]."""
    return (p.to(stack.dtype) @ stack.flatten(1)).view(-1, *stack.shape[1:])


def _drop(p: Tensor, kept: Tensor) -> Tensor:
    left = p * kept
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp(min=torch.finfo(p.dtype).tiny), 1 / p.shape[-1])
