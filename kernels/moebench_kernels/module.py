"""MoE layers as modules: the experts alone, and the whole layer with router, gate and shared expert.

    MoEExperts   y[t] = sum over kept k of weights[t, k] * f_e(x[t]),  e = ids[t, k]          (moe_layer)
    MoELayer     ids, weights = gate(router(x));  y = experts(x, ids, weights) + shared(x)

Under autocast the experts take x and their matrices in autocast's dtype, as nn.Linear does; the router weights stay
float32. Every forward then casts the matrices, which costs a copy of all experts: `.to(dtype)` is the cheaper way.

Names in a state_dict: router.weight, [router.bias,] [selection_bias,] experts.gate_up, experts.down,
[experts.gate_up_bias, experts.down_bias,] [shared.gate_up.weight, shared.down.weight, shared.gate.weight].
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moebench_kernels.activation import ACTIVATIONS, activate_torch, input_maps
from moebench_kernels.checks import check_choice
from moebench_kernels.gate import GROUP_SCORES, ORDERS, topk_gate
from moebench_kernels.gate_scores import SCORINGS
from moebench_kernels.layer import moe_layer


@dataclass(frozen=True)
class GateOptions:
    """What `topk_gate` takes beside logits, K and bias; see there."""

    scoring: str = "softmax"
    order: str = "score_first"
    renormalise: bool = False
    n_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError for a scoring, order or group score that does not exist."""
        check_choice("scoring", self.scoring, SCORINGS)
        check_choice("order", self.order, ORDERS)
        check_choice("group_score", self.group_score, GROUP_SCORES)


class MoEExperts(nn.Module):
    """The routed experts of an MoE layer.

    Args:
        n_experts, hidden_size, ffn_size: E, D, F.
        activation: as in `moe_layer`.
        bias: whether both maps have biases.
        device, dtype: of the parameters.

    Attributes:
        gate_up: [E, 2F, D], gate rows first, or [E, F, D] for ungated activations.
        down: [E, D, F].
        gate_up_bias: [E, 2F] or [E, F], or None. down_bias: [E, D], or None.

    Raises:
        ValueError: an unknown activation, or a size below 1.
    """

    def __init__(
        self, n_experts: int, hidden_size: int, ffn_size: int, *, activation: str = "swiglu", bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        _check_sizes(n_experts=n_experts, hidden_size=hidden_size, ffn_size=ffn_size)
        width, factory = input_maps(activation) * ffn_size, {"device": device, "dtype": dtype}
        self.n_experts, self.hidden_size, self.ffn_size, self.activation = n_experts, hidden_size, ffn_size, activation
        self.gate_up = nn.Parameter(torch.empty(n_experts, width, hidden_size, **factory))
        self.down = nn.Parameter(torch.empty(n_experts, hidden_size, ffn_size, **factory))
        self.gate_up_bias = nn.Parameter(torch.empty(n_experts, width, **factory)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(n_experts, hidden_size, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(inputs), each expert as an nn.Linear of its own."""
        for weight, bias in ((self.gate_up, self.gate_up_bias), (self.down, self.down_bias)):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, **options: Any) -> Tensor:
        """The experts on given routing.

        Args:
            x: [..., D].
            ids: int32 or int64 [..., K], with x's leading dimensions.
            weights: [..., K], any float dtype; used in float32.
            options: `capacity`, `priority` or `plan`, as in `moe_layer`.

        Returns:
            [..., D], of x's dtype (of autocast's under autocast).

        Raises:
            TypeError, ValueError: before any launch.
        """
        if x.shape[:-1] != ids.shape[:-1] or ids.shape != weights.shape or ids.shape[-1] < 1:
            raise ValueError(
                f"x is {list(x.shape)}, ids {list(ids.shape)} and weights {list(weights.shape)}; "
                "needed: [..., D], [..., K] and [..., K], with K >= 1"
            )
        rows, gate_up, down, b_gate_up, b_down = _autocast(
            x, self.gate_up, self.down, self.gate_up_bias, self.down_bias
        )
        y = moe_layer(
            rows.reshape(-1, x.shape[-1]).contiguous(), ids.reshape(-1, ids.shape[-1]),
            weights.reshape(-1, ids.shape[-1]).float(), gate_up, down, activation=self.activation,
            b_gate_up=b_gate_up, b_down=b_down, **options,
        )  # fmt: skip
        return y.view(x.shape)

    def extra_repr(self) -> str:
        """The sizes, as in the constructor."""
        bias = "" if self.gate_up_bias is None else ", bias=True"
        return f"{self.n_experts}, {self.hidden_size}, {self.ffn_size}, activation={self.activation!r}{bias}"


class SharedExpert(nn.Module):
    """An expert that every token takes, in plain torch: dense matrix products.

    With `gated_output` its answer is scaled by sigmoid(<gate, x>), as in Qwen2-MoE.
    """

    def __init__(
        self, hidden_size: int, ffn_size: int, *, activation: str = "swiglu", gated_output: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype, "bias": False}
        self.activation = activation
        self.gate_up = nn.Linear(hidden_size, input_maps(activation) * ffn_size, **factory)
        self.down = nn.Linear(ffn_size, hidden_size, **factory)
        self.gate = nn.Linear(hidden_size, 1, **factory) if gated_output else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        y = self.down(activate_torch(self.gate_up(x), self.activation))
        return y if self.gate is None else torch.sigmoid(self.gate(x)) * y


class MoELayer(nn.Module):
    """A whole MoE layer: linear router, gate, routed experts and an optional shared expert.

    Args:
        n_experts, top_k, hidden_size, ffn_size: E, K, D, F.
        activation: as in `moe_layer`; the shared expert's too.
        gate: how experts are chosen and weighted.
        selection_bias: whether the gate has a bias that only chooses (DeepSeek-V3): a float32 buffer [E] of zeros,
            which the training loop moves. It stays float32 under `.to(dtype)`, `.half()` and the like.
        bias, router_bias: whether the experts' maps, the router have biases.
        shared_ffn_size: of the shared expert, 0 for none. shared_gate: whether its answer is scaled by a sigmoid.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown activation or scoring, a size below 1, or top_k > n_experts.

    The router's logits, as an auxiliary loss wants them, are the output of `layer.router` (a forward hook sees them).
    """

    def __init__(
        self, n_experts: int, top_k: int, hidden_size: int, ffn_size: int, *, activation: str = "swiglu",
        gate: GateOptions = GateOptions(), selection_bias: bool = False, bias: bool = False, router_bias: bool = False,
        shared_ffn_size: int = 0, shared_gate: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k is {top_k}; it must be 1 to n_experts ({n_experts})")
        self.top_k, self.gate, self._gate_arguments = top_k, gate, asdict(gate)
        self.experts = MoEExperts(n_experts, hidden_size, ffn_size, activation=activation, bias=bias, **factory)
        self.router = nn.Linear(hidden_size, n_experts, bias=router_bias, **factory)
        zeros = torch.zeros(n_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("selection_bias", zeros)
        self.shared = (
            SharedExpert(hidden_size, shared_ffn_size, activation=activation, gated_output=shared_gate, **factory)
            if shared_ffn_size
            else None
        )

    def reset_parameters(self) -> None:
        """All parameters anew, the selection bias to zero."""
        self.experts.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        if self.selection_bias is not None:
            self.selection_bias.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> "MoELayer":
        """As for any module, but the selection bias stays float32: scores differ by less than bfloat16 tells apart."""
        kept = self.selection_bias
        super()._apply(fn, recurse)
        if kept is not None and self.selection_bias.dtype != torch.float32:
            self.selection_bias = kept.to(self.selection_bias.device)
        return self

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """ids int32 [..., K] and weights float32 [..., K] of x [..., D]."""
        logits = self.router(x).reshape(-1, self.experts.n_experts)
        ids, weights = topk_gate(logits, self.top_k, bias=self.selection_bias, **self._gate_arguments)
        return ids.view(*x.shape[:-1], self.top_k), weights.view(*x.shape[:-1], self.top_k)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """The layer.

        Args:
            x: [..., D].
            options: `capacity` or `priority`, as in `moe_layer`.

        Returns:
            [..., D], of x's dtype (of autocast's under autocast).

        Raises:
            TypeError, ValueError: before any launch.
        """
        ids, weights = self.route(x)
        y = self.experts(x, ids, weights, **options)
        return y if self.shared is None else y + self.shared(x)

    def extra_repr(self) -> str:
        """K and the gate."""
        return f"top_k={self.top_k}, gate={self.gate}, selection_bias={self.selection_bias is not None}"


def _autocast(x: Tensor, *parameters: Tensor | None) -> list[Any]:
    """In autocast's dtype where it is on for x's device, else as they are; float64 is left alone, as nn.Linear does."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return [x, *parameters]
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *parameters)]


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
