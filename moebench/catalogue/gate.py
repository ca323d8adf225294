"""The weights of a layer's gate: names and shapes. No torch.

The main map is "router"; what a router has beside it is named in its row of `moebench.catalogue.routers`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from moebench.catalogue.routers import router_info

if TYPE_CHECKING:
    from moebench.catalogue.spec import LayerSpec

COSINE_WIDTH = 256  # Swin-MoE projects to 256 dimensions
VOCABULARY = 32768  # token ids of hash tables and domain maps here; a published model's own is larger
CONTEXT_WIDTH = 16  # of MixER's context vectors

# Imposed logits are z = W x. Near a square W some x are hundreds of times larger than z, and rounding them flips
# choices: of 1,536 tokens 49 in bf16 at E = D = 64, and 169 at 256; none at E = 0.8 D.
WELL_CONDITIONED = 0.8

# Not parameters that a forward pass multiplies with: chosen by, looked up, or a single number.
NOT_COUNTED = ("selection_bias", "table", "thresholds", "temperature", "slot_scale")


def gate_shapes(layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape, "router" first.

    "router" [E, D] (cosine: [E, 256]; Soft MoE: [E * slots, D]; MixER: [E, 16]; with zero experts [E + Z, D]; routers
    that look at token ids alone: [E, 0]);
    "logit_bias", "selection_bias", "thresholds" [E]; "noise", "key", "value" [E, D]; "mix" [E, E];
    "groups", "group_noise" [G, D]; "project" [256, D]; "temperature", "slot_scale" []; "table" int64 [V, K].
    """
    D, E, K, spec = layer.hidden_size, layer.choices, layer.top_k, layer.router
    width = {"cosine": COSINE_WIDTH, "mixer": CONTEXT_WIDTH, "hash": 0, "domain_random": 0}.get(spec.kind, D)
    shapes = {
        "router": (E * (spec.slots if spec.kind == "soft_moe" else 1), width),
        "logit_bias": (E,),
        "selection_bias": (E,),
        "thresholds": (E,),
        "noise": (E, D),
        "mix": (E, E),
        "key": (E, D),
        "value": (E, D),
        "groups": (spec.groups, D),
        "group_noise": (spec.groups, D),
        "project": (COSINE_WIDTH, D),
        "temperature": (),
        "slot_scale": (),
        "table": (VOCABULARY, K),
    }
    extra = router_info(spec.kind).gate
    names = ("router", *(("logit_bias",) if spec.logit_bias else ()), *extra)
    return {name: shapes[name] for name in names}


def gate_maps(layer: LayerSpec) -> int:
    """Parameters of the linear maps that a token passes in the gate; those of noise only in training."""
    unused = () if layer.router.training else ("noise", "group_noise")
    shapes = {name: shape for name, shape in gate_shapes(layer).items() if name not in (*NOT_COUNTED, *unused)}
    return sum(prod(shape) for shape in shapes.values() if len(shape) > 1)


def gate_params(layer: LayerSpec) -> int:
    """Parameters of the gate; selection biases, tables and single numbers are not counted."""
    return sum(prod(shape) for name, shape in gate_shapes(layer).items() if name not in NOT_COUNTED)
