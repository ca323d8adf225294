"""Top-k of scores: the rules of most published models. z are the logits, u = score(z), b a selection bias.

    choose the k experts with the largest u + b (inside the best groups), weigh them by u, without b
    softmax_topk  u = softmax(z)        sigmoid_*  u = sigmoid(z)        sqrt_softplus_*  u = sqrt(softplus(z))

Weights are divided by their sum where spec.normalise, then multiplied by spec.scale. Choices carry no gradient. Ties
go where torch.topk puts them: a stable sort would cost ten times as much at E = 4096.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moebench.catalogue.spec import RouterSpec
from moebench.routing.forms import TopK, top_k_routing
from moebench.routing.scores import Scores

TINY = 1e-20  # below any float32 sum of weights that are not all zero; DeepSeek's code adds the same
SOFT_CAP = 30.0  # Grok-2


def softmax_topk(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """OLMoE, Qwen (arXiv 2409.02060); Switch with one pick; with spec.normalise Qwen3 and DBRX."""
    return _weighed(scores, spec, *_best(torch.softmax(scores.logits, dim=-1), top_k))


def topk_softmax(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """Softmax over the chosen logits only: Mixtral, gpt-oss."""
    chosen, ids = _best(scores.logits, top_k)
    return _routing(scores, ids, torch.softmax(chosen, dim=-1) * spec.scale)


def sigmoid_topk(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """LFM2 without its expert bias, Cohere2."""
    return _weighed(scores, spec, *_best(torch.sigmoid(scores.logits), top_k))


def sigmoid_bias(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """DeepSeek-V3 (arXiv 2412.19437, eq. 12-16): a group's score is the sum of its two best biased scores."""
    return _biased(scores, spec, top_k, torch.sigmoid(scores.logits))


def sqrt_softplus_bias(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """DeepSeek-V4."""
    return _biased(scores, spec, top_k, sqrt_softplus(scores.logits))


def softmax_bias(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """ERNIE 4.5; LongCat-Flash, whose logits also name zero experts."""
    return _biased(scores, spec, top_k, torch.softmax(scores.logits, dim=-1))


def sigmoid_logit_bias(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """Kolibri 1: the bias is added to the logits before anything is scored."""
    _, ids = _best(_plus_bias(scores.logits, scores.bias), top_k)
    return _weighed(scores, spec, torch.sigmoid(scores.logits).gather(1, ids), ids)


def group_limited(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """DeepSeek-V2 (arXiv 2405.04434, section 2.1.2): only the topk_groups groups with the largest maximum."""
    return _grouped(scores, spec, top_k, 1)


def group_limited_sum2(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """Mistral 4: softmax scores, a group's score is the sum of its two best."""
    return _grouped(scores, spec, top_k, 2)


def sigmoid_input(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """Llama 4: the weight multiplies the expert's input."""
    chosen, ids = _best(scores.logits, top_k)
    weights = torch.sigmoid(chosen) * spec.scale
    return top_k_routing(ids, weights, scores.logits.shape[1], scores.logits, on_input=True)


def logit_standardised(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """Skywork-MoE (arXiv 2406.06563, eq. 4), lambda = 1; a row of equal logits stays a row of equal logits."""
    z = scores.logits
    # Scale first: squares of huge logits overflow, and the result does not depend on it.
    z = z / z.detach().abs().amax(dim=-1, keepdim=True).clamp_min(1.0)
    spread = z.std(dim=-1, unbiased=True, keepdim=True) if z.shape[1] > 1 else torch.zeros_like(z)
    standard = (z - z.mean(dim=-1, keepdim=True)) / spread.clamp_min(torch.finfo(z.dtype).tiny)
    return _weighed(scores, spec, *_best(torch.softmax(standard, dim=-1), top_k))


def softcap_softmax_topk(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """Grok-2: logits are capped softly at 30."""
    capped = SOFT_CAP * torch.tanh(scores.logits / SOFT_CAP)
    return _weighed(scores, spec, *_best(torch.softmax(capped, dim=-1), top_k))


def sqrt_softplus(z: Tensor) -> Tensor:
    """sqrt(log(1 + e^z)); bounded away from 0, where its slope is infinite."""
    return F.softplus(z).clamp_min(torch.finfo(z.dtype).tiny).sqrt()


def renormalised(weights: Tensor, spec: RouterSpec) -> Tensor:
    """Weights [T, K] divided by their sum if the router does so, then scaled."""
    if spec.normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    return weights * spec.scale


def in_best_groups(choice: Tensor, spec: RouterSpec, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Selection scores [T, E] with -inf outside the topk_groups best of the groups.

    Args:
        score: [T, G, E/G] -> [T, G].
    """
    grouped = choice.unflatten(1, (spec.groups, -1))
    best = score(grouped).topk(spec.topk_groups, dim=-1).indices
    kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter_(1, best, True)
    masked: Tensor = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
    return masked


def _sum_of_best(count: int) -> Callable[[Tensor], Tensor]:
    return lambda grouped: grouped.topk(min(count, grouped.shape[-1]), dim=-1).values.sum(dim=-1)


def _grouped(scores: Scores, spec: RouterSpec, top_k: int, best: int) -> TopK:
    values = torch.softmax(scores.logits, dim=-1)
    choice = in_best_groups(values.detach(), spec, _sum_of_best(best)) if spec.groups > 1 else values.detach()
    _, ids = _best(choice, top_k)
    return _weighed(scores, spec, values.gather(1, ids), ids)


def _biased(scores: Scores, spec: RouterSpec, top_k: int, values: Tensor) -> TopK:
    choice = _plus_bias(values.detach(), scores.bias)
    if spec.groups > 1:
        choice = in_best_groups(choice, spec, _sum_of_best(2))
    _, ids = _best(choice, top_k)
    return _weighed(scores, spec, values.gather(1, ids), ids)


def _plus_bias(values: Tensor, bias: Tensor | None) -> Tensor:
    return values if bias is None else values + bias.detach().to(values)


def _best(values: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and where they are, [T, K] each, in falling order."""
    found = values.topk(top_k, dim=-1)
    return found.values, found.indices


def _weighed(scores: Scores, spec: RouterSpec, weights: Tensor, ids: Tensor) -> TopK:
    return _routing(scores, ids, renormalised(weights, spec))


def _routing(scores: Scores, ids: Tensor, weights: Tensor) -> TopK:
    return top_k_routing(ids, weights, scores.logits.shape[1], scores.logits)
