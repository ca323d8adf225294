"""Our kernels as an experts implementation of the transformers library.

    register_transformers()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moebench")

transformers hands an experts module, hidden states [T, D], expert ids [T, K] and router weights [T, K] to the
function registered under that name. Here the module's parameters become the arguments of `moe_layer`; what they
cannot become is an error that says so, never a silent fallback.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from moebench_kernels.activation import ACTIVATIONS, activate_torch
from moebench_kernels.layer import moe_layer

GATED = ("swiglu", "geglu", "clamped_swiglu")


class _Relaid(NamedTuple):
    """Converted weights: of which parameters, in which state, and what they became."""

    key: tuple[Any, ...]
    of: list[ReferenceType[Tensor]]
    tensors: dict[str, Tensor]


# By module, and gone with it: which activation it computes, and its weights in our layout where its own differs.
_activations: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_relaid: WeakKeyDictionary[nn.Module, _Relaid] = WeakKeyDictionary()


def register_transformers(name: str = "moebench") -> None:
    """Register the kernels as the experts implementation `name`, for the whole process.

    Models take it by `experts_implementation=name` in `from_pretrained`, or later by
    `model.set_experts_implementation(name)`. Registering again under the same name does nothing.

    Raises:
        TypeError: the name is no text.
        ImportError: transformers is missing, or is older than 5.0.
        ValueError: the name is taken by another implementation.

    Source: transformers' `ExpertsInterface`, transformers/integrations/moe.py (5.0 to 5.23).
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            f"transformers has no experts interface here ({error}); it needs transformers >= 5.0: "
            "pip install 'transformers>=5.0'"
        ) from error
    if not isinstance(name, str) or not name:
        raise TypeError(f"name is {name!r}; a text is needed")
    taken = "eager" if name == "eager" else ALL_EXPERTS_FUNCTIONS.get(name)
    if taken not in (None, experts_forward):
        raise ValueError(f"transformers already has an experts implementation {name!r}; choose another name")
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The routed experts of a transformers model on our kernels. Differentiable.

    Args:
        module: the experts module: parameters gate_up_proj and down_proj (and biases), flags is_transposed,
            is_concatenated, has_gate, has_bias, has_post_expert_norm.
        hidden_states: [T, D]; computed in the weights' dtype.
        top_k_index: int [T, K]; ids of num_experts or more (another rank's, under expert parallelism) are dropped.
        top_k_weights: [T, K].

    Returns:
        [T, D] in the dtype of hidden_states.

    Raises:
        NotImplementedError: the module computes what the kernels do not; the message names it.
        TypeError, ValueError: as `moe_layer`, say where no kernel can run.
    """
    activation = activation_of(module)
    tensors = expert_tensors(module)
    x = hidden_states.to(tensors["w_gate_up"].dtype).contiguous()
    y = moe_layer(x, top_k_index, top_k_weights.float(), **tensors, activation=activation)
    return y.to(hidden_states.dtype)


@torch.compiler.assume_constant_result
def activation_of(module: nn.Module) -> str:
    """Which of our activations an experts module computes, found by trying it on probes.

    Raises:
        NotImplementedError: none of them, or the module does more than two products and an activation.
    """
    found = _activations.get(module)
    if found is None:
        found = _activations[module] = _identify(module)
    return found


def _identify(module: nn.Module) -> str:
    named = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise NotImplementedError(f"{named} normalises each expert's answer, which the kernels do not")
    # Up to a million, far past any clamp: a limit that the probes do not reach would go unseen.
    size = torch.logspace(-3, 6, 28)
    gate, up = torch.cat([size, -size]), torch.cat([-size, size]).roll(9)
    rows = torch.stack([torch.cat([gate, up]), torch.cat([up, gate])])
    has_gate = getattr(module, "has_gate", True)
    theirs = _their_activation(module, rows)
    for name in ACTIVATIONS:
        if (name in GATED) is has_gate:
            ours = activate_torch(rows, name)
            if ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6):
                return name
    shown = type(module.act_fn).__name__ if hasattr(module, "act_fn") else "its own gate"
    raise NotImplementedError(
        f"{named} computes an activation ({shown}) that is none of the kernels' {', '.join(ACTIVATIONS)}"
    )


@torch.no_grad()
def _their_activation(module: nn.Module, rows: Tensor) -> Tensor:
    """What the module makes of pre-activations [n, m*F], gate columns first: float32 [n, F]."""
    if not getattr(module, "has_gate", True):
        return module.act_fn(rows)
    if not getattr(module, "is_concatenated", True):
        rows = torch.stack(rows.chunk(2, dim=-1), dim=-1).flatten(-2)  # gate and up columns alternate
    return module._apply_gate(rows)


def expert_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of an experts module as arguments of `moe_layer`.

    Those that are stored in our layout are passed as they are. Others are converted: in training (and under
    torch.compile) at every call, so that gradients reach the module's own; otherwise once, and kept, which takes their
    memory once more. They are converted again after training, and when a parameter was replaced, moved or written
    in place. What was written through `.data` or by another process leaves no trace: call `forget_converted` then.
    """
    names = ["gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"]
    if getattr(module, "has_bias", False):
        names += [f"{name}_bias" for name in names]
    stored = [getattr(module, name) for name in names]
    if not (getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True)):
        return _as_arguments([value.contiguous() for value in stored])
    in_graph = torch.is_grad_enabled() and any(value.requires_grad for value in stored)
    if in_graph or torch.compiler.is_compiling() or any(value.is_inference() for value in stored):
        if not torch.compiler.is_compiling():
            _relaid.pop(module, None)  # averaged weights are often written through `.data`, between two steps
        return _as_arguments(_convert(module, stored))
    key = tuple((value.data_ptr(), value._version, value.dtype, value.device) for value in stored)
    kept = _relaid.get(module)
    if kept is None or kept.key != key or any(was() is not now for was, now in zip(kept.of, stored, strict=True)):
        converted = _as_arguments(_convert(module, [value.detach() for value in stored]))
        kept = _relaid[module] = _Relaid(key, [ref(value) for value in stored], converted)
    return kept.tensors


def forget_converted(model: nn.Module) -> None:
    """Drop what was converted for any module of `model`: after writes to its experts through `.data`.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; an nn.Module is needed")
    for module in model.modules():
        _relaid.pop(module, None)


def _convert(module: nn.Module, stored: list[Tensor]) -> list[Tensor]:
    """[E, D, mF] to [E, mF, D] and [E, F, D] to [E, D, F] where transposed; alternating rows to gate rows first."""
    first, second, *biases = stored
    if module.is_transposed:
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    if module.has_gate and not module.is_concatenated:
        first = torch.cat([first[:, 0::2], first[:, 1::2]], dim=1)
        if biases:
            biases = [torch.cat([biases[0][:, 0::2], biases[0][:, 1::2]], dim=1), biases[1]]
    return [value.contiguous() for value in (first, second, *biases)]


def _as_arguments(tensors: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("w_gate_up", "w_down", "b_gate_up", "b_down"), tensors, strict=False))
