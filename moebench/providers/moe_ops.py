"""moe-ops: its permute, grouped GEMM and unpermute, with the activation in PyTorch between them."""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.catalogue.spec import ACTIVATIONS
from moebench.providers.case import Case
from moebench.providers.layer_parts import activate
from moebench.providers.peers import Call, peer, peer_provider


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case) -> Call:
    """w_gate_up [E, m*F, D], w_down [E, D, F], as they are (trans_b)."""
    permute, grouped_gemm, unpermute = peer("moe_ops", "permute", "grouped_gemm", "unpermute")
    E, activation = w_down.shape[0], case.activation

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        rows, row_id_map, offsets = permute(x, ids.to(torch.int32), E=E)
        hidden = activate(grouped_gemm(rows, w_gate_up, offsets, trans_b=True), activation)
        out = grouped_gemm(hidden, w_down, offsets, trans_b=True)
        y: Tensor = unpermute(out, row_id_map, gates, num_tokens=x.shape[0], num_topK=ids.shape[1])
        return y

    return call


PROVIDER = peer_provider(
    "moe-ops", ready, directions=("forward", "forward_backward"), activations=ACTIVATIONS, multiple_of=8
)
