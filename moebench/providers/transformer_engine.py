"""transformer-engine: moe_permute, two GroupedLinear, moe_unpermute, with the activation in PyTorch between them.

GroupedLinear owns one parameter per expert, so a gradient would reach those and not the layer's: forward only. It
takes the rows per expert from the host, which waits for them at every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moebench.catalogue.spec import ACTIVATIONS
from moebench.providers.case import Case
from moebench.providers.layer_parts import activate
from moebench.providers.peers import Call, peer, peer_provider


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case) -> Call:
    """Views [m*F, D] and [D, F] of each expert's weights, as parameters of the two modules."""
    permute, unpermute, linear = peer("transformer_engine.pytorch", "moe_permute", "moe_unpermute", "GroupedLinear")
    up, down = grouped_linear(linear, w_gate_up), grouped_linear(linear, w_down)
    E, activation = w_down.shape[0], case.activation

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        sizes = torch.bincount(ids.flatten(), minlength=E).tolist()
        rows, row_id_map = permute(x, ids.to(torch.int32), ids.numel(), map_type="index")
        out = down(activate(up(rows, sizes), activation), sizes)
        y: Tensor = unpermute(out, row_id_map, gates, map_type="index")
        return y

    return call


def grouped_linear(linear: Any, weights: Tensor) -> Any:
    """A GroupedLinear whose parameters are views of weights [E, D_out, D_in]."""
    E, D_out, D_in = weights.shape
    module = linear(E, D_in, D_out, bias=False, params_dtype=weights.dtype, device=weights.device)
    for expert, weight in enumerate(weights.detach().unbind()):
        setattr(module, f"weight{expert}", torch.nn.Parameter(weight, requires_grad=False))
    return module


PROVIDER = peer_provider("transformer-engine", ready, activations=ACTIVATIONS, multiple_of=16)
