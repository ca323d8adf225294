"""flashinfer: cutlass_fused_moe. It wants the up rows before the gate rows."""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.providers.case import Case
from moebench.providers.peers import Call, peer, peer_provider, require_capability, up_first


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case) -> Call:
    """A copy [E, 2F, D] of w_gate_up with its halves exchanged; w_down [E, D, F] as it is."""
    require_capability("flashinfer's CUTLASS MoE", w_down.device, (8, 9, 10, 12))
    function = peer("flashinfer.fused_moe", "cutlass_fused_moe")
    w_in = up_first(w_gate_up)

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        found = function(x, ids.to(torch.int32), gates, w_in, w_down, x.dtype, quant_scales=None)
        y: Tensor = found if isinstance(found, Tensor) else found[0]  # a list of one in 0.6
        return y

    return call


PROVIDER = peer_provider("flashinfer", ready, multiple_of=8)
