"""How many parameters a model has, from the arithmetic of its architecture. No torch.

Weights of linear maps, embeddings and convolutions are counted; biases and
norms where the facts name them.
"""

from __future__ import annotations

from dataclasses import dataclass

from moebench.catalogue.spec import MoELayers


@dataclass(frozen=True)
class Parts:
    """A model's parameters by where they stand; absolute numbers.

    Attributes:
        embedding: token (or patch) embeddings and the output head.
        mixing: attention, Mamba, linear attention, LSTM: whatever mixes tokens.
        dense: feed-forward networks outside the MoE layers.
        layers: the MoE layers.
        norms: normalisation scales and shifts, and what else is too small to name.
    """

    embedding: int
    mixing: int
    dense: int
    layers: tuple[MoELayers, ...]
    norms: int = 0

    @property
    def always(self) -> int:
        """Parameters outside the MoE layers: every token meets them."""
        return self.embedding + self.mixing + self.dense + self.norms

    @property
    def total(self) -> int:
        """All parameters."""
        return self.always + sum(kind.count * kind.layer.total_params() for kind in self.layers)

    @property
    def active(self) -> int:
        """Parameters one token meets, embeddings included."""
        return self.always + sum(kind.count * kind.layer.active_params() for kind in self.layers)


def linear(inputs: int, outputs: int, *, bias: bool = False) -> int:
    """Parameters of one linear map."""
    return inputs * outputs + (outputs if bias else 0)


def gqa(
    hidden_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
) -> int:
    """Grouped-query attention (arXiv 2305.13245): q, k, v and output maps; kv_heads = heads is plain multi-head."""
    qkv = linear(hidden_size, (heads + 2 * kv_heads) * head_dim, bias=qkv_bias)
    return qkv + linear(heads * head_dim, hidden_size, bias=out_bias)


def mla(
    hidden_size: int, heads: int, q_lora_rank: int, kv_lora_rank: int, nope_dim: int, rope_dim: int, v_dim: int
) -> int:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); q_lora_rank 0: queries uncompressed."""
    q_width = heads * (nope_dim + rope_dim)
    query = hidden_size * q_lora_rank + q_lora_rank * q_width if q_lora_rank else hidden_size * q_width
    latent = hidden_size * (kv_lora_rank + rope_dim) + kv_lora_rank * heads * (nope_dim + v_dim)
    return query + latent + heads * v_dim * hidden_size


def mamba(hidden_size: int, state: int, conv: int, expand: int, dt_rank: int) -> int:
    """One Mamba-1 mixer (arXiv 2312.00752): in, conv, x, dt, A, D and out, biases of conv and dt included."""
    inner = expand * hidden_size
    scan = inner * (dt_rank + 2 * state) + linear(dt_rank, inner, bias=True) + inner * state + inner
    return hidden_size * 2 * inner + inner * (conv + 1) + scan + inner * hidden_size


def lstm(inputs: int, units: int) -> int:
    """One LSTM layer: four gates over input and state, with biases."""
    return 4 * linear(inputs + units, units, bias=True)
