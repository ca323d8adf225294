"""The layer forms as yardsticks: other functions than the layer's, each checked against its own float64 reference.

They take the layer's sizes (`moebench.catalogue.layer_forms` says how) and the draw's hidden states; their weights and
their routing are their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moebench.catalogue.layer_forms import attention_heads, form_fault, form_work, moh_work
from moebench.catalogue.spec import LayerSpec
from moebench.layer_forms import bank, depths, hetero, hyper, lora, moh, multihead, peer, smear
from moebench.point import DROPLESS, PLAIN_PRECISIONS
from moebench.providers.base import source_digest
from moebench.providers.case import Case
from moebench.weights import DTYPES, Weights, seed_of
from moebench.workload import Inputs


class Form(Protocol):
    """What a module of `moebench.layer_forms` holds."""

    def make_weights(
        self, layer: LayerSpec, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Tensor]: ...
    def choices(self, layer: LayerSpec, weights: dict[str, Tensor], x: Tensor) -> Tensor | None: ...
    def forward(self, layer: LayerSpec, weights: dict[str, Tensor], x: Tensor) -> Tensor: ...
    def reference(
        self, layer: LayerSpec, weights: dict[str, Tensor], x: Tensor, chosen: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class FormState:
    """A form's weights, and the case they are for."""

    weights: dict[str, Tensor]
    case: Case


@dataclass(frozen=True)
class LayerForm:
    """A form as a provider of scope `layer`, forward.

    Attributes:
        name: as in `moebench.catalogue.layer_forms.LAYER_FORMS`.
        form: its module.
    """

    name: str
    form: Form
    version: str = f"torch {torch.__version__}"

    def fingerprint(self) -> str:
        return source_digest(self.form.forward, self.version, source_digest(bank.run_experts))

    def interpreted(self, device_kind: str) -> bool:
        return False

    def refuse(self, case: Case) -> str | None:
        if case.scope != "layer":
            return f"{self.name} is a whole layer and has no scope {case.scope!r}"
        if case.direction != "forward":
            return f"{self.name} is measured forward only"
        if case.precision not in PLAIN_PRECISIONS:
            return f"{self.name} takes precisions {', '.join(PLAIN_PRECISIONS)}, not {case.precision}"
        if case.capacity.factor != DROPLESS:
            return f"{self.name} knows no capacity; only {DROPLESS!r} can be run"
        return form_fault(self.name, case.layer)

    def prepare(self, weights: Weights, case: Case) -> FormState:
        device = weights.w_gate_up.device
        generator = torch.Generator(device=device).manual_seed(seed_of("layer form", self.name, case.layer))
        made = self.form.make_weights(case.layer, generator, DTYPES[case.precision], device)
        return FormState(made, case)

    def scope_inputs(self, state: FormState, inputs: Inputs) -> Inputs:
        return inputs

    def run(self, state: FormState, inputs: Inputs) -> Tensor:
        return self.form.forward(state.case.layer, state.weights, inputs.x)

    def own_reference(self, state: FormState, x: Tensor) -> Tensor:
        """The form's float64 answer: x float64 [T, D], exactly the inputs' values -> float64 [T, D].

        Choices are float64's own; those that differ from the provider's by a rounding of the scores are the provider's.
        """
        case, form = state.case, self.form
        with torch.no_grad():
            chosen = form.choices(case.layer, state.weights, x.to(DTYPES[case.precision]))
            return form.reference(case.layer, state.weights, x, chosen)

    def executed_flops(self, case: Case, counts: Tensor) -> float | None:
        """Of the matrix products, from the sizes; the counts are another routing's. None where the draw decides."""
        if self.name == "mixture-of-depths" and not case.layer.router.training:
            return None
        if self.name == "moh":
            return moh_work(case.layer, case.tokens, attention_heads(case.layer))[0]
        return form_work(self.name, case.layer, case.tokens)[0]


SMEAR = LayerForm("smear", smear)
MIXTURE_OF_DEPTHS = LayerForm("mixture-of-depths", depths)
MOH = LayerForm("moh", moh)
PEER = LayerForm("peer", peer)
HYPER_MOE = LayerForm("hyper-moe", hyper)
MULTI_HEAD_MOE = LayerForm("multi-head-moe", multihead)
LORA_MOE = LayerForm("lora-moe", lora)
HETERO_MOE = LayerForm("hetero-moe", hetero)
