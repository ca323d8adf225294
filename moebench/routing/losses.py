"""What keeps experts evenly loaded in training: the losses, and the bias update that does without one.

f_e share of the wanted assignments that go to expert e (before any dropping), P_e mean probability of expert e:

    Switch              E sum_e f_e P_e
    GShard              (1/E) sum_e f_e P_e, f of first choices alone
    device level        sum_d (mean of E f_e over the experts of d) (sum of P_e over the experts of d)
    communication       sum_d (devices / M) (share of the tokens that go to d) (sum of P_e over the experts of d)
    importance, load    CV^2 over the experts of sum_t g_te, of sum_t Pr(expert e is among the K of token t)
    router z            mean_t (logsumexp_e z_te)^2
    LIMoE               mean_t H(p_t), and -H(mean_t p_t)
    orthogonality       mean over pairs of experts of the squared cosine of their weights
    CMR gate            |mean_t g_t - budget|

All are unweighted; published weights stand in `moebench.catalogue.losses`. The dtype is that of what comes in, counts
carry no gradient, and an id of -1 is not wanted and counts nowhere.

Scope. A function sees one micro-batch. With `tokens_per_sequence` it is taken within each sequence (or local group) and
averaged. Over a global batch: average f and P of equal micro-batches (`balance_fractions`, `switch_of`), or sum what
`cv_squared` is taken of.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def balance_fractions(probs: Tensor, ids: Tensor, tokens_per_sequence: int | None = None) -> tuple[Tensor, Tensor]:
    """(f, P), each [E], or [sequences, E]; both sum to 1 where the probabilities of a token do.

    Args:
        probs: [T, E].
        ids: int64 [T, K] before dropping; -1 where no expert is wanted.
        tokens_per_sequence: None: all tokens together.

    Raises:
        ValueError: T is not a whole number of sequences.
    """
    T, E = probs.shape
    sequences = _sequences(T, tokens_per_sequence)
    counts = _counts(ids, E, sequences)
    f = counts.to(probs) / counts.sum(dim=1, keepdim=True).clamp(min=1)
    P = probs.view(sequences, -1, E).mean(dim=1)
    return (f[0], P[0]) if tokens_per_sequence is None else (f, P)


def switch_of(f: Tensor, P: Tensor) -> Tensor:
    """E sum_e f_e P_e, the mean over sequences where there are some: 1 where f or P is uniform. See `switch`."""
    return f.shape[-1] * (f * P).sum(dim=-1).mean()


def switch(probs: Tensor, ids: Tensor, tokens_per_sequence: int | None = None) -> Tensor:
    """Switch's loss, with K picks each counting 1/K; arguments as `balance_fractions`.

    1 for uniform routing. It is no less wherever f rises with P, but may be less where the probabilities of few sure
    tokens lie elsewhere than the picks of many unsure ones.

    Source: Switch, arXiv 2101.03961, section 2.2; with K picks and f scaled by E / (K T) also DeepSeek-V2's
    expert-level loss, arXiv 2405.04434, section 2.2.3.
    """
    return switch_of(*balance_fractions(probs, ids, tokens_per_sequence))


def sequence_level(scores: Tensor, ids: Tensor, tokens_per_sequence: int) -> Tensor:
    """Switch's loss within each sequence, on scores that are first divided by their sum over the experts.

    Args:
        scores: [T, E], at least 0 (sigmoid in DeepSeek-V3).

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """
    total = scores.sum(dim=1, keepdim=True)
    return switch(scores / total.clamp(min=torch.finfo(scores.dtype).tiny), ids, tokens_per_sequence)


def gshard(probs: Tensor, ids: Tensor, tokens_per_sequence: int | None = None) -> Tensor:
    """(1/E) sum_e (c_e / S) m_e over S tokens (of a local group, with `tokens_per_sequence`); c counts first choices.

    1 / E^2 for uniform routing. Released code (Lingvo) multiplies by E^2.

    Source: GShard, arXiv 2006.16668, algorithm 1.
    """
    f, m = balance_fractions(probs, ids[:, :1], tokens_per_sequence)
    return (f * m).sum(dim=-1).mean() / probs.shape[1]


def device_level(probs: Tensor, ids: Tensor, devices: int, tokens_per_sequence: int | None = None) -> Tensor:
    """sum_d f'_d P'_d, f'_d the mean of E f_e and P'_d the sum of P_e over the experts of device d; 1 if uniform.

    Args:
        devices: equal blocks of consecutive experts; the others as `balance_fractions`.

    Raises:
        ValueError: the experts do not divide among the devices.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.2.3.
    """
    f, P = balance_fractions(probs, ids, tokens_per_sequence)
    E = probs.shape[1]
    return (_by_device(E * f, devices).mean(dim=-1) * _by_device(P, devices).sum(dim=-1)).sum(dim=-1).mean()


def communication(
    probs: Tensor, ids: Tensor, devices: int, limit: int, tokens_per_sequence: int | None = None
) -> Tensor:
    """sum_d f''_d P''_d, f''_d = devices / (M T) times the tokens with an expert on d, P''_d the sum of P_e there.

    1 for uniform routing where every token goes to M devices.

    Args:
        limit: M, the most devices a token goes to; the others as `device_level`.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.2.3.
    """
    T, E = probs.shape
    _, P = balance_fractions(probs, ids, tokens_per_sequence)
    held = _by_device(P, devices).sum(dim=-1)
    device = torch.where(ids < 0, devices, ids.div(E // devices, rounding_mode="floor"))
    sent = torch.zeros(T, devices + 1, dtype=torch.bool, device=ids.device).scatter_(1, device, True)[:, :devices]
    share = sent.view(_sequences(T, tokens_per_sequence), -1, devices).to(probs).mean(dim=1)
    return (devices / limit * share * held).sum(dim=-1).mean()


def importance(gates: Tensor) -> Tensor:
    """CV^2 of each expert's sum of gate values; 0 where all are equal.

    Args:
        gates: [T, E], 0 where an expert is not chosen (`dense`); V-MoE takes softmax(z) of all experts.

    Source: Shazeer 2017, arXiv 1701.06538, section 4.
    """
    return cv_squared(gates.sum(dim=0))


def load(clean: Tensor, noisy: Tensor, noise_std: Tensor | float, top_k: int, *, of_others: bool = True) -> Tensor:
    """CV^2 of each expert's smooth load sum_t P_te; 0 where all are equal (so where all experts are chosen).

    P_te = Phi((z_te - threshold) / noise std): whether expert e is chosen if its own noise alone is drawn again.

    Args:
        clean: z [T, E] without noise.
        noisy: [T, E], what was decided on.
        noise_std: [T, E], softplus(x W_noise); V-MoE: 1 / E.
        of_others: the threshold is the K-th largest noisy logit of the *other* experts (Shazeer); False: of all
            (V-MoE).

    Source: Shazeer 2017, arXiv 1701.06538, appendix A; V-MoE, arXiv 2106.05974, appendix A.2.
    """
    return cv_squared(chosen_probability(clean, noisy, noise_std, top_k, of_others=of_others).sum(dim=0))


def chosen_probability(
    clean: Tensor, noisy: Tensor, noise_std: Tensor | float, top_k: int, *, of_others: bool = True
) -> Tensor:
    """P [T, E] of `load`; 1 where every expert is chosen."""
    E = clean.shape[1]
    if top_k >= E:
        return torch.ones_like(clean)
    most = torch.finfo(clean.dtype).max / 4  # so that differences are finite, those of -inf too
    clean, noisy = clean.clamp(-most, most), noisy.clamp(-most, most)
    largest = noisy.topk(top_k + 1, dim=1).values
    at, after = largest[:, top_k - 1, None], largest[:, top_k, None]
    # Without a chosen expert the K-th largest is the one after; without any other it stays.
    threshold = torch.where(noisy > after, after, at) if of_others else at
    std = torch.as_tensor(noise_std, dtype=clean.dtype, device=clean.device)
    chosen: Tensor = torch.special.ndtr((clean - threshold) / std.clamp(min=torch.finfo(clean.dtype).tiny))
    return chosen


def cv_squared(values: Tensor) -> Tensor:
    """Squared coefficient of variation, by the population variance; 0 where all values are 0."""
    return values.var(correction=0) / values.mean().square().clamp(min=torch.finfo(values.dtype).tiny)


def dense(ids: Tensor, weights: Tensor, routed_experts: int) -> Tensor:
    """Weights [T, K] as [T, E], 0 where an expert is not chosen; differentiable."""
    return torch.zeros(len(ids), routed_experts, dtype=weights.dtype, device=weights.device).scatter_add(
        1, ids.clamp(min=0), weights.masked_fill(ids < 0, 0)
    )


def router_z(logits: Tensor) -> Tensor:
    """mean_t (logsumexp_e z_te)^2: 0 where every token's exp(z) sum to 1, log^2 E where all logits are 0.

    Source: ST-MoE, arXiv 2202.08906.
    """
    return torch.logsumexp(logits, dim=1).square().mean()


def local_entropy(probs: Tensor, modality: Tensor | None = None, modalities: int = 1) -> Tensor:
    """Mean entropy of the tokens' distributions, which makes each sure of its experts: a scalar, or one a modality.

    Args:
        probs: [T, E].
        modality: int64 [T] below `modalities`: the result is [modalities], 0 for one without tokens.

    Source: LIMoE, arXiv 2206.02770.
    """
    entropy = _entropy(probs)
    return entropy.mean() if modality is None else _mean_of(entropy[:, None], modality, modalities)[:, 0]


def global_entropy(
    probs: Tensor, modality: Tensor | None = None, modalities: int = 1, *, least_experts: float | None = None
) -> Tensor:
    """-H(mean_t p_t), which spreads tokens over experts; -log E where the mean is uniform.

    Args:
        probs, modality, modalities: as `local_entropy`.
        least_experts: S, a soft minimum: max(0, log S - H), so nothing is asked beyond S experts. None: no threshold.

    Source: LIMoE, arXiv 2206.02770.
    """
    mean = probs.mean(dim=0) if modality is None else _mean_of(probs, modality, modalities)
    loss = -_entropy(mean)
    if least_experts is None:
        return loss
    loss = (loss + math.log(least_experts)).clamp(min=0)
    if modality is None:
        return loss
    present = torch.zeros(modalities, dtype=torch.bool, device=loss.device).index_fill_(0, modality, True)
    return torch.where(present, loss, 0)


def orthogonality(expert_weights: Tensor) -> Tensor:
    """Mean squared cosine of the weights of two different experts: 0 where all are orthogonal, 1 where parallel.

    Args:
        expert_weights: [E, ...].

    Source: after OMoE, arXiv 2310.09762, whose optimiser has the same aim but projects updates and adds no loss.
    """
    unit = F.normalize(expert_weights.flatten(1), dim=1)
    E = len(unit)
    cosines = unit @ unit.T
    off = cosines.square().sum() - cosines.diagonal().square().sum()
    return off / max(1, E * (E - 1))


def cmr_gate(gates: Tensor, budget: float) -> Tensor:
    """|mean gate - budget|: how much of the traffic may take the MoE branch.

    Args:
        gates: g [T] in y = (1 - g) FFN + g MoE.

    Source: NLLB, arXiv 2207.04672, conditional MoE routing.
    """
    return (gates.mean() - budget).abs()


def update_bias(bias: Tensor, counts: Tensor, rate: float = 0.001) -> Tensor:
    """b_e + rate * sign(mean load - load_e): no loss at all.

    Args:
        bias: [E], used to choose and not to weigh.
        counts: int64 [E], wanted assignments of the whole batch.

    Source: arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437 (rate 0.001).
    """
    return bias + rate * torch.sign(counts.sum() - counts * counts.numel()).to(bias)


def _sequences(tokens: int, tokens_per_sequence: int | None) -> int:
    if tokens_per_sequence is None:
        return 1
    if tokens_per_sequence < 1 or tokens % tokens_per_sequence:
        raise ValueError(f"{tokens} tokens are not a whole number of sequences of {tokens_per_sequence}")
    return tokens // tokens_per_sequence


def _counts(ids: Tensor, routed_experts: int, sequences: int) -> Tensor:
    """Wanted assignments per expert, int64 [sequences, E]."""
    rows = torch.where(ids < 0, routed_experts, ids).view(sequences, -1)
    counts = torch.zeros(sequences, routed_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(1, rows, torch.ones_like(rows))[:, :routed_experts]


def _by_device(values: Tensor, devices: int) -> Tensor:
    """[..., E] as [..., devices, E / devices]."""
    E = values.shape[-1]
    if devices < 1 or E % devices:
        raise ValueError(f"{E} experts do not divide among {devices} devices")
    return values.view(*values.shape[:-1], devices, E // devices)


def _entropy(probs: Tensor) -> Tensor:
    log = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()  # finite at 0, and so is its gradient
    return (probs * log).sum(dim=-1).neg()


def _mean_of(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Mean of the rows [T, N] of each group: [groups, N]; 0 for an empty one."""
    total = torch.zeros(groups, values.shape[1], dtype=values.dtype, device=values.device)
    counts = torch.bincount(group, minlength=groups).clamp(min=1)
    return total.index_add(0, group, values) / counts[:, None].to(values)
