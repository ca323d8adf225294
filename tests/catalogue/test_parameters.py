"""The arithmetic, by hand and against torch's own modules."""

from __future__ import annotations

import torch

from moebench.catalogue.parameters import Parts, gqa, lstm, mamba, mla
from moebench.catalogue.spec import LayerSpec, MoELayers


def count(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_gqa_is_four_linear_maps() -> None:
    def maps(qkv_bias: bool, out_bias: bool) -> int:
        widths = ((64, 96), (64, 24), (64, 24))
        return count(*(torch.nn.Linear(*w, bias=qkv_bias) for w in widths), torch.nn.Linear(96, 64, bias=out_bias))

    assert gqa(64, 8, 2, 12) == maps(False, False)
    assert gqa(64, 8, 2, 12, qkv_bias=True) == maps(True, False)
    assert gqa(64, 8, 2, 12, qkv_bias=True, out_bias=True) == maps(True, True)


def test_mla_with_and_without_compressed_queries() -> None:
    assert mla(64, 4, 0, 16, 8, 4, 8) == 64 * 48 + 64 * 20 + 16 * 4 * 16 + 32 * 64
    assert mla(64, 4, 24, 16, 8, 4, 8) == 64 * 24 + 24 * 48 + 64 * 20 + 16 * 4 * 16 + 32 * 64


def test_lstm_holds_one_bias_where_torch_holds_two() -> None:
    assert lstm(32, 16) == count(torch.nn.LSTM(32, 16)) - 4 * 16


def test_mamba_of_jamba() -> None:
    D, inner, state, conv, rank = 64, 128, 16, 4, 4
    by_hand = D * 2 * inner + inner * conv + inner + inner * (rank + 2 * state) + rank * inner + inner
    assert mamba(D, state, conv, 2, rank) == by_hand + inner * state + inner + inner * D


def test_total_and_active() -> None:
    layer = LayerSpec(8, 4, 6, 2)
    parts = Parts(embedding=100, mixing=10, dense=5, layers=(MoELayers("", layer, 3),), norms=1)
    expert, router = 3 * 8 * 4, 6 * 8
    assert parts.total == 116 + 3 * (6 * expert + router)
    assert parts.active == 116 + 3 * (2 * expert + router)
