"""The routers moebench knows by name: rule, source, and whether it is built. No torch.

A preset keeps its own router's name even where that router is not built yet;
traffic or scopes that need it are then refused by name, never replaced.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterInfo:
    """One routing rule.

    Attributes:
        rule: the formula, z being the logits.
        source: the paper or model it comes from.
        built: whether `moebench.routing` implements it.
        linear: whether z = W x, so that chosen logits can be imposed through x.
    """

    rule: str
    source: str
    built: bool = False
    linear: bool = True


ROUTERS: dict[str, RouterInfo] = {
    "softmax_topk": RouterInfo(
        "top-k of softmax(z); weights are the selected values, renormalised if asked", "OLMoE, Qwen, DBRX", built=True
    ),
    "topk_softmax": RouterInfo("softmax over the k largest z", "Mixtral, gpt-oss", built=True),
    "switch_top1": RouterInfo(
        "top-1 of softmax(z); its value scales the output", "Switch, arXiv 2101.03961", built=True
    ),
    "sigmoid_bias": RouterInfo(
        "top-k of sigmoid(z) + b (within the best groups); weights without b", "DeepSeek-V3, arXiv 2412.19437"
    ),
    "sigmoid_topk": RouterInfo(
        "top-k of sigmoid(z); weights are the selected values, renormalised if asked", "LFM2, Cohere2"
    ),
    "sigmoid_logit_bias": RouterInfo("top-k of z + b; weights sigmoid(z) without b", "Kolibri 1"),
    "softmax_bias": RouterInfo("top-k of softmax(z) + b; weights without b, renormalised", "ERNIE 4.5"),
    "softmax_bias_zero": RouterInfo(
        "top-k of softmax(z) + b over the experts and further zero experts, which return their input", "LongCat-Flash"
    ),
    "group_limited_sum2": RouterInfo(
        "softmax(z); top-k inside the best groups (group score: sum of its two best)", "Mistral 4"
    ),
    "group_limited": RouterInfo(
        "softmax(z); top-k inside the best groups (group score: max)", "DeepSeek-V2, arXiv 2405.04434"
    ),
    "gshard_top2": RouterInfo(
        "top-2 of softmax(z), renormalised; second kept if 2 g2 > U(0,1)", "GShard, arXiv 2006.16668"
    ),
    "gumbel_top2": RouterInfo(
        "first of softmax(z), second of z + Gumbel noise; the two values renormalised",
        "DeepSpeed-MoE, arXiv 2201.05596",
    ),
    "noisy_topk": RouterInfo(
        "softmax over the k largest of xW + noise", "Shazeer 2017, arXiv 1701.06538", linear=False
    ),
    "noisy_softmax_topk": RouterInfo("top-k of softmax(z + N(0, 1/E^2))", "V-MoE, arXiv 2106.05974"),
    "hierarchical_noisy_topk": RouterInfo(
        "top-k of groups, then of experts inside each", "Shazeer 2017, arXiv 1701.06538", linear=False
    ),
    "cosine": RouterInfo("z = cos(Px, w) * min(exp(tau), 100); top-k of softmax", "Swin-MoE (Tutel)", linear=False),
    "logit_standardised": RouterInfo("softmax((z - mean) / std); top-k", "Skywork-MoE, arXiv 2406.06563"),
    "sigmoid_input": RouterInfo("top-1 of z; sigmoid(z) multiplies the expert's input", "Llama 4"),
    "attention": RouterInfo("top-k of softmax(q k^T) v over experts", "Yuan 2.0-M32, arXiv 2405.17976", linear=False),
    "sparsemixer": RouterInfo("one masked softmax per pick", "Phi-3.5-MoE"),
    "softcap_softmax_topk": RouterInfo("top-k of softmax(30 tanh(z / 30))", "Grok-2"),
    "recycle_top1": RouterInfo("softmax top-1; tokens over capacity go to random experts with room", "Hunyuan-Large"),
    "product_key": RouterInfo(
        "product-key retrieval over single-neuron experts", "PEER, arXiv 2407.04153", linear=False
    ),
    "sqrt_softplus_bias": RouterInfo("top-k of sqrt(softplus(z)) + b", "DeepSeek-V4"),
    "hash_sqrt_softplus": RouterInfo(
        "experts = table[token id]; weights sqrt(softplus(z)) of those, renormalised",
        "DeepSeek-V4, first layers",
        linear=False,
    ),
    "hash": RouterInfo("expert = table[token id], weight 1", "Hash Layers, arXiv 2106.04426", linear=False),
}
