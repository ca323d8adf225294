"""From a row of models.csv to parameter counts: what its architecture adds to the MoE layers. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moebench.catalogue.parameters import Parts, gqa, lstm, mamba, mla
from moebench.catalogue.spec import MoELayers, ffn_params

Row = Mapping[str, str]

# Rows whose architecture is known only in part: null totals, with the reason.
UNCOUNTED = {
    "v-moe-b16": "the size of the classifier head is not known",
    "swin-moe-s-64": "patch merging and relative position maps of the hierarchy are not modelled",
    "swin-moe-b-32": "patch merging and relative position maps of the hierarchy are not modelled",
    "qwen3-next-80b-a3b": "sizes of the linear-attention layers are not in the facts; its config.json gives them",
    "deepseek-v4-flash": "compressed sparse attention is not modelled",
    "deepseek-v4-pro": "compressed sparse attention is not modelled",
}
# Counted but for these parts, which the facts do not size.
LEFT_OUT = {
    "shazeer-moe-137b": "word embedding and softmax",
    "llama4-scout": "vision encoder",
    "llama4-maverick": "vision encoder",
    "moe-llava-phi2": "vision tower and projector",
    "glm-4.5": "multi-token-prediction layer",
    "glm-4.5-air": "multi-token-prediction layer",
    "glm-5": "sparse-attention indexer",
}
# A token passes two levels of the gate, not its whole table: the linear router's count would be wrong.
NO_ACTIVE = {"shazeer-moe-137b": "the two-level gate reads only the chosen groups"}

JFT_CLASSES = 18291  # V-MoE was trained on JFT-300M
PATCH = {"v-moe-l16": 16, "v-moe-h14": 14}
ASSUMED_VOCABULARY = {"hunyuan-large": 129024}
# The first layer is dense, of the standard width its experts are an eighth of.
ASSUMED_DENSE_FFN = {"deepseekmoe-145b": 11264}
GSHARD_TARGET_VOCABULARY = 32000
JAMBA = {"attention_every": 8, "state": 16, "conv": 4, "expand": 2, "dt_rank": 256}
MINIMAX_SOFTMAX_EVERY = 8


def parts(row: Row, layers: tuple[MoELayers, ...]) -> Parts | None:
    """The parameters of one layer-exact row, or None where `UNCOUNTED` says why not."""
    if row["id"] in UNCOUNTED:
        return None
    return Parts(embedding=_embedding(row), mixing=_MIXING[row["arch"]](row), dense=_dense(row, layers), layers=layers)


def _int(row: Row, column: str) -> int:
    return int(row[column] or 0)


def _embedding(row: Row) -> int:
    width = _int(row, "hidden_size")
    if row["id"] in PATCH:
        return width * (3 * PATCH[row["id"]] ** 2 + JFT_CLASSES)
    if row["id"] == "gshard-600b":
        return width * (_int(row, "vocab") + 2 * GSHARD_TARGET_VOCABULARY)
    vocabulary = _int(row, "vocab") or ASSUMED_VOCABULARY.get(row["id"], 0)
    return width * vocabulary * (1 if row["tied_embeddings"] == "y" else 2)


def _dense(row: Row, layers: tuple[MoELayers, ...]) -> int:
    moe_layers = sum(kind.count for kind in layers)
    if row["arch"] == "LSTM language model":
        return 0
    # ST-MoE keeps a dense FFN beside each sparse one, so every layer has one (sparse-dense stacking).
    count = _int(row, "layers") - (0 if row["id"] == "st-moe-32b" else moe_layers)
    # GLaM's dense FFN is gated although its experts are not.
    gated = layers[0].layer.gated or row["id"] == "glam-64b64e"
    width = _int(row, "dense_ffn_size") or ASSUMED_DENSE_FFN.get(row["id"], 0)
    if count and not width:
        raise ValueError(f"models.csv: {row['id']} has {count} dense layers of unknown width")
    return count * ffn_params(_int(row, "hidden_size"), width, gated=gated)


def _attention(row: Row) -> int:
    return gqa(_int(row, "hidden_size"), _int(row, "heads"), _int(row, "kv_heads"), _int(row, "head_dim"))


def _decoder(row: Row) -> int:
    return _int(row, "layers") * _attention(row)


def _encoder_decoder(row: Row) -> int:
    # Each decoder layer, half of them all, attends a second time: to the encoder.
    return (_int(row, "layers") + _int(row, "layers") // 2) * _attention(row)


def _mla(row: Row) -> int:
    sizes = ("heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return _int(row, "layers") * mla(_int(row, "hidden_size"), *(_int(row, size) for size in sizes))


def _half_the_keys(row: Row) -> int:
    # Cross-layer attention: two layers share one key and value projection.
    unshared = gqa(_int(row, "hidden_size"), _int(row, "heads"), 0, _int(row, "head_dim"))
    return _int(row, "layers") // 2 * (unshared + _attention(row))


def _lightning(row: Row) -> int:
    softmax_layers = _int(row, "layers") // MINIMAX_SOFTMAX_EVERY
    # Lightning attention: q, k, v, output gate and output maps, all full width.
    lightning = 5 * _int(row, "hidden_size") * _int(row, "heads") * _int(row, "head_dim")
    return softmax_layers * _attention(row) + (_int(row, "layers") - softmax_layers) * lightning


def _jamba(row: Row) -> int:
    attention_layers = _int(row, "layers") // JAMBA["attention_every"]
    mixer = mamba(_int(row, "hidden_size"), JAMBA["state"], JAMBA["conv"], JAMBA["expand"], JAMBA["dt_rank"])
    return attention_layers * _attention(row) + (_int(row, "layers") - attention_layers) * mixer


def _lstm(row: Row) -> int:
    return _int(row, "layers") * lstm(_int(row, "hidden_size"), _int(row, "hidden_size"))


_MIXING: dict[str, Callable[[Row], int]] = {
    "LSTM language model": _lstm,
    "decoder": _decoder,
    "decoder (dense-MoE hybrid)": _decoder,
    "decoder (localised filtering attention)": _decoder,
    "multimodal decoder": _decoder,
    "vision encoder": _decoder,
    "encoder-decoder": _encoder_decoder,
    "decoder (MLA)": _mla,
    "decoder (MLA + sparse index)": _mla,
    "decoder (GQA + cross-layer KV sharing)": _half_the_keys,
    "decoder (7 linear-attention : 1 softmax)": _lightning,
    "decoder (Mamba-attention hybrid)": _jamba,
}
