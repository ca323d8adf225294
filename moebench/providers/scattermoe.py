"""scattermoe: its two ParallelLinear products, as its own MLP and GLUMLP chain them; the second weighs and sums.

It multiplies float32 in TF32, so float32 is not taken.
"""

from __future__ import annotations

from torch import Tensor

from moebench.catalogue.spec import ACTIVATIONS
from moebench.providers.case import Case
from moebench.providers.layer_parts import activate
from moebench.providers.peers import Call, peer, peer_provider


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case) -> Call:
    """Transposed views [E, D, m*F] and [E, F, D] of the weights, as its ParallelExperts passes its own."""
    sort, linear = peer("scattermoe.parallel_experts", "flatten_sort_count", "parallel_linear")
    E, activation = w_down.shape[0], case.activation

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        experts, assignments, offsets = sort(ids, num_experts=E)
        up = linear(x, w_gate_up.permute(0, 2, 1), ids.shape[1], experts, assignments, offsets, grouped_out=True)
        y: Tensor = linear(
            activate(up, activation),
            w_down.permute(0, 2, 1),
            1,
            experts,
            assignments,
            offsets,
            grouped_in=True,
            gates=gates.to(x.dtype),
        )
        return y

    return call


PROVIDER = peer_provider("scattermoe", ready, directions=("forward", "forward_backward"), activations=ACTIVATIONS)
