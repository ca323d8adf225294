"""Parameters of what mixes tokens (attention and its kin) in a config.json's model, biases and inner norms included.

No torch. Each rule is named in families.csv's `attention` column, with its options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moebench.catalogue.parameters import gqa, linear, mamba, mla
from moebench.catalogue.values import MAX_LAYERS, Values

Options = Mapping[str, str]


@dataclass(frozen=True)
class Heads:
    """The head counts and widths of softmax attention."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int


def mixing_params(rule: str, values: Values, hidden_size: int, layers: int) -> int:
    """Parameters of all mixers of `layers` layers under `rule`."""
    name, *words = rule.split()
    options = dict(word.partition("=")[::2] for word in words)
    return _RULES[name](values, hidden_size, layers, options)


def heads(values: Values, hidden_size: int) -> Heads:
    """Attention sizes; null kv heads are as many as heads, a null head width is hidden size over heads."""
    count = values.count("num_attention_heads|n_heads|num_heads")
    kv_heads = values.optional_count("num_key_value_heads|attn_config.kv_n_heads", 1) or count
    return Heads(hidden_size, count, kv_heads, values.optional_count("head_dim", 1) or hidden_size // count)


def _on(values: Values, options: Options, option: str) -> bool:
    """Whether the option is there and the key it names, if any, is true."""
    return option in options and (not options[option] or values.flag(options[option]))


def _gqa_layer(values: Values, size: Heads, options: Options) -> int:
    q_width, kv_width = size.heads * size.head_dim, size.kv_heads * size.head_dim
    both = _on(values, options, "bias")
    params = gqa(
        size.hidden_size,
        size.heads,
        size.kv_heads,
        size.head_dim,
        qkv_bias=both or _on(values, options, "qkv_bias"),
        out_bias=both,
    )
    norm = options.get("qknorm", "none")
    per_head = norm == "head" or (norm not in ("none", "full") and values.flag(norm))
    params += q_width + kv_width if norm == "full" else 2 * size.head_dim if per_head else 0
    params += size.hidden_size * q_width if options.get("gate") == "full" else 0
    return params + (size.heads if "sinks" in options else 0)


def _gqa(values: Values, hidden_size: int, layers: int, options: Options) -> int:
    return layers * _gqa_layer(values, heads(values, hidden_size), options)


def _mla(values: Values, hidden_size: int, layers: int, options: Options) -> int:
    count = values.count("num_attention_heads")
    q_rank, kv_rank = values.optional_count("q_lora_rank") or 0, values.count("kv_lora_rank")
    rope = values.count("qk_rope_head_dim", 0)
    nope, v_dim = values.count("qk_nope_head_dim"), values.count("v_head_dim")
    params = mla(hidden_size, count, q_rank, kv_rank, nope, rope, v_dim) + q_rank + kv_rank
    if values.flag("attention_bias"):
        params += q_rank + kv_rank + rope + hidden_size
    total = layers * params * (2 if "twice" in options else 1)
    if "indexer" not in options:
        return total
    width, wide = values.count("index_head_dim"), values.count("index_n_heads")
    indexer = q_rank * wide * width + hidden_size * (width + wide) + 2 * width
    return total + _indexers(values, layers) * indexer


def _indexers(values: Values, layers: int) -> int:
    """Layers with a sparse-attention indexer of their own; the others share one (GLM-5.2)."""
    kinds = values.names("indexer_types")
    if kinds is not None:
        return kinds.count("full")
    every = values.optional_count("index_topk_freq", 1) or 1
    offset = values.optional_count("index_skip_topk_offset")
    first = 2 if offset is None else offset
    return sum(max(i - first + 1, 0) % every == 0 for i in range(layers))


def _layer_types(values: Values, layers: int, default: list[str]) -> list[str]:
    kinds = values.names("layer_types")
    if kinds is not None and len(kinds) != layers:
        raise values.fault("layer_types", kinds, f"a list of {layers} names, one a layer")
    return kinds if kinds is not None else default


def _deltanet(values: Values, hidden_size: int, layers: int, options: Options) -> int:
    """Three Gated DeltaNet layers to one of gated attention (Qwen3-Next)."""
    every = values.optional_count("full_attention_interval", 1) or 4
    default = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    full = _layer_types(values, layers, default).count("full_attention")
    size = heads(values, hidden_size)
    # The query map also makes the output gate, hence twice its width.
    bias = {"bias": "attention_bias", "qknorm": "head", "gate": "full"}
    attention = _gqa_layer(values, size, bias)
    if values.flag("attention_bias"):
        attention += size.heads * size.head_dim
    return full * attention + (layers - full) * _delta_layer(values, hidden_size)


def _delta_layer(values: Values, hidden_size: int) -> int:
    """One Gated DeltaNet mixer: input maps, convolution, decay, gated norm, output map."""
    key_width = values.count("linear_num_key_heads") * values.count("linear_key_head_dim")
    v_heads, v_dim = values.count("linear_num_value_heads"), values.count("linear_value_head_dim")
    v_width = v_heads * v_dim
    inputs = hidden_size * (2 * key_width + 2 * v_width + 2 * v_heads)
    conv = (2 * key_width + v_width) * values.count("linear_conv_kernel_dim")
    return inputs + conv + 2 * v_heads + v_dim + v_width * hidden_size


def _lara(values: Values, hidden_size: int, layers: int, options: Options) -> int:
    """Gated DeltaNet layers beside sliding and full attention without an output gate, in fives (Lara Mini)."""
    fives = ("linear_attention", "sliding_attention", "linear_attention", "full_attention", "sliding_attention")
    default = [fives[i % len(fives)] for i in range(layers)]
    linears = _layer_types(values, layers, default).count("linear_attention")
    attention = _gqa_layer(values, heads(values, hidden_size), options)
    return linears * _delta_layer(values, hidden_size) + (layers - linears) * attention


def _lightning(values: Values, hidden_size: int, layers: int, options: Options) -> int:
    """Lightning attention beside softmax attention (MiniMax-01)."""
    default = ["full_attention" if (i + 1) % 2 else "linear_attention" for i in range(layers)]
    full = _layer_types(values, layers, default).count("full_attention")
    size = heads(values, hidden_size)
    width = size.heads * size.head_dim
    return full * _gqa_layer(values, size, options) + (layers - full) * (5 * hidden_size * width + width)


def _jamba(values: Values, hidden_size: int, layers: int, options: Options) -> int:
    """Mamba layers with attention every few (Jamba); dt, B and C have norms of their own."""
    period, offset = values.count("attn_layer_period"), values.count("attn_layer_offset", 0)
    full = sum(i % period == offset for i in range(layers))
    state = values.count("mamba_d_state")
    automatic = values.raw("mamba_dt_rank") == "auto"
    dt_rank = math.ceil(hidden_size / 16) if automatic else values.count("mamba_dt_rank")
    conv, expand = values.count("mamba_d_conv"), values.count("mamba_expand")
    inner = expand * hidden_size
    mixer = mamba(hidden_size, state, conv, expand, dt_rank) + dt_rank + 2 * state
    mixer -= 0 if values.flag("mamba_conv_bias") else inner
    mixer += 2 * inner + hidden_size if values.flag("mamba_proj_bias") else 0
    return full * _gqa_layer(values, heads(values, hidden_size), options) + (layers - full) * mixer


def _t5(values: Values, hidden_size: int, layers: int, options: Options) -> int:
    """T5 attention and norms: a decoder layer also attends to the encoder; two tables of relative positions."""
    decoder = values.count("num_decoder_layers", most=MAX_LAYERS)
    count = values.count("num_heads")
    inner = count * values.count("d_kv")
    attention = 4 * hidden_size * inner
    norms = hidden_size * (2 * layers + 3 * decoder + 2)
    positions = 2 * values.count("relative_attention_num_buckets") * count
    return (layers + 2 * decoder) * attention + norms + positions


def _nllb(values: Values, hidden_size: int, layers: int, options: Options) -> int:
    """M2M-100 attention and norms, all with biases."""
    decoder = values.count("decoder_layers", most=MAX_LAYERS)
    attention = 4 * linear(hidden_size, hidden_size, bias=True)
    norms = 2 * hidden_size * (2 * layers + 3 * decoder + 2)
    return (layers + 2 * decoder) * attention + norms


_RULES: dict[str, Callable[[Values, int, int, Options], int]] = {
    "gqa": _gqa,
    "mla": _mla,
    "deltanet": _deltanet,
    "lara": _lara,
    "lightning": _lightning,
    "jamba": _jamba,
    "t5": _t5,
    "nllb": _nllb,
}
