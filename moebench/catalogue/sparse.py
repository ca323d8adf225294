"""Which layers of a config.json's model are MoE layers, and how many are dense. No torch.

Each rule is named in families.csv's `sparse` column, with the key it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moebench.catalogue.values import MAX_LAYERS, Values

Counts = tuple[dict[str, int], int]  # MoE layers by kind ("" where there is one), dense layers

SPARSE_NAMES = {"sparse": "", "moe": "", "hash_moe": "hash"}
NEMOTRON_DEFAULT = ["mamba", "moe", "attention", "mlp"]
NEMOTRON_PATTERN = {"E": "moe", "-": "mlp", "M": "mamba", "*": "attention"}


def layer_counts(rule: str, values: Values, layers: int) -> Counts:
    """MoE layers by kind and the number of dense layers among `layers`.

    A list `mlp_layer_types`, or a list `moe_layer_freq` of zeros and ones, stands above the family's rule.

    Raises:
        ValueError: a list of the wrong length or with an unknown name, or an impossible step.
    """
    named = values.names("mlp_layer_types")
    if named is not None:
        return _named(values, named, layers)
    frequency = values.raw("moe_layer_freq")
    if isinstance(frequency, list):
        return _listed(values, frequency, layers)
    if values.raw("pyramid_num_routed") is not None:
        raise values.fault("pyramid_num_routed", values.raw("pyramid_num_routed"), "null: one number of experts")
    name, _, key = rule.partition(" ")
    return _RULES[name](values, layers, key)


def _named(values: Values, named: list[str], layers: int) -> Counts:
    if len(named) != layers or not set(named) <= {*SPARSE_NAMES, "dense"}:
        raise values.fault("mlp_layer_types", named, f"{layers} names, each dense, {', '.join(SPARSE_NAMES)}")
    kinds = dict.fromkeys(sorted({SPARSE_NAMES[name] for name in named if name != "dense"}, reverse=True), 0)
    for name in named:
        if name != "dense":
            kinds[SPARSE_NAMES[name]] += 1
    if len(kinds) > 1:
        kinds = {kind or "learned": count for kind, count in kinds.items()}
    return kinds, named.count("dense")


def _listed(values: Values, frequency: list[Any], layers: int) -> Counts:
    if len(frequency) != layers or not all(type(item) is int and item in (0, 1) for item in frequency):
        raise values.fault("moe_layer_freq", frequency, f"a number, or {layers} zeros and ones")
    return _split(sum(frequency), layers)


def _split(sparse: int, layers: int) -> Counts:
    return {"": sparse}, layers - sparse


def _all(values: Values, layers: int, key: str) -> Counts:
    return _split(layers, layers)


def _dense_first(values: Values, layers: int, key: str) -> Counts:
    first = values.count(key, 0)
    # DeepSeek's own code: every n-th layer past the dense ones.
    every = 1 if values.raw("moe_layer_freq") is None else values.count("moe_layer_freq")
    return _split(sum(i >= first and i % every == 0 for i in range(layers)), layers)


def _step(values: Values, layers: int, key: str) -> Counts:
    step = values.count("decoder_sparse_step")
    dense = set(values.indices("mlp_only_layers", layers) or ())
    return _split(sum((i + 1) % step == 0 and i not in dense for i in range(layers)), layers)


def _period(values: Values, layers: int, key: str) -> Counts:
    period, offset = values.count("expert_layer_period"), values.count("expert_layer_offset", 0)
    return _split(sum(i % period == offset for i in range(layers)), layers)


def _llama4(values: Values, layers: int, key: str) -> Counts:
    chosen = values.indices("moe_layers", layers)
    step = values.count("interleave_moe_layer_step")
    return _split(len(set(chosen)) if chosen is not None else len(range(step - 1, layers, step)), layers)


def _ernie(values: Values, layers: int, key: str) -> Counts:
    start, every = values.count("moe_layer_start_index", 0), values.count("moe_layer_interval")
    end = values.count("moe_layer_end_index", -1)
    last = layers - 1 if end == -1 else end
    return _split(sum((i + 1) % every == 0 and start <= i <= last for i in range(layers)), layers)


def _v4(values: Values, layers: int, key: str) -> Counts:
    hashed = min(values.count("num_hash_layers", 0), layers)
    kinds = {"hash": hashed, "learned": layers - hashed}
    return {name: count for name, count in kinds.items() if count}, 0


def _longcat(values: Values, layers: int, key: str) -> Counts:
    # A LongCat layer holds two attentions and two dense FFNs, and one MoE across them.
    return {"": layers}, 2 * layers


def depth(rule: str, values: Values, key: str) -> int:
    """How many layers the model has."""
    return len(_nemotron_names(values)) if rule == "nemotron" else values.count(key, most=MAX_LAYERS)


def _nemotron(values: Values, layers: int, key: str) -> Counts:
    if values.optional_count("moe_latent_size"):
        raise values.fault("moe_latent_size", values.raw("moe_latent_size"), "null; narrower experts are not modelled")
    named = _nemotron_names(values)
    return {"": named.count("moe")}, named.count("mlp")


def _nemotron_names(values: Values) -> list[str]:
    named = values.names("layers_block_type|layer_types")
    pattern = values.raw("hybrid_override_pattern")
    if named is None and pattern is not None:
        if not isinstance(pattern, str) or not set(pattern) <= set(NEMOTRON_PATTERN):
            raise values.fault("hybrid_override_pattern", pattern, f"text of {' '.join(NEMOTRON_PATTERN)}")
        named = [NEMOTRON_PATTERN[letter] for letter in pattern]
    return NEMOTRON_DEFAULT if named is None else named


def _switch(values: Values, layers: int, key: str) -> Counts:
    decoder = values.count("num_decoder_layers", most=MAX_LAYERS)
    sparse = 0
    for depth, name in ((layers, "num_sparse_encoder_layers"), (decoder, "num_sparse_decoder_layers")):
        wanted = values.count(name, 0)
        step = depth // wanted if wanted else depth
        if wanted > depth:
            raise values.fault(name, wanted, f"at most its {depth} layers")
        sparse += sum(i % step == 1 or step == 1 for i in range(depth)) if step > 0 else 0
    return _split(sparse, layers + decoder)


def _nllb(values: Values, layers: int, key: str) -> Counts:
    decoder = values.count("decoder_layers", most=MAX_LAYERS)
    if values.count("decoder_ffn_dim") != values.count("encoder_ffn_dim"):
        raise values.fault("decoder_ffn_dim", values.raw("decoder_ffn_dim"), "encoder_ffn_dim: one width of expert")
    sparse = 0
    for depth, name in ((layers, "encoder_sparse_step"), (decoder, "decoder_sparse_step")):
        step = values.count(name, 0)
        sparse += depth // step if step else 0
    return _split(sparse, layers + decoder)


_RULES: dict[str, Callable[[Values, int, str], Counts]] = {
    "all": _all,
    "dense_first": _dense_first,
    "step": _step,
    "period": _period,
    "llama4": _llama4,
    "ernie": _ernie,
    "v4": _v4,
    "longcat": _longcat,
    "nemotron": _nemotron,
    "switch": _switch,
    "nllb": _nllb,
}
