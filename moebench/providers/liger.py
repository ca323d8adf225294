"""liger: LigerFusedMoEFunction of liger-kernel. Its weights have our layout; it waits once for the host per call."""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.providers.case import Case
from moebench.providers.peers import Call, peer, peer_provider


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case) -> Call:
    """w_gate_up [E, 2F, D], w_down [E, D, F], as they are."""
    function = peer("liger_kernel.ops", "LigerFusedMoEFunction")

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        y: Tensor = function.apply(x, w_gate_up, w_down, ids.to(torch.int32), gates)
        return y

    return call


PROVIDER = peer_provider("liger", ready, directions=("forward", "forward_backward"))
