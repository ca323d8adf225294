"""What a layer and a model are: plain numbers, no torch.

Shape letters, used everywhere: T tokens, D hidden_size, F expert_ffn_size,
E routed_experts, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moebench.catalogue.gate import gate_params

GATED_ACTIVATIONS = ("swiglu", "geglu", "clamped_swiglu", "limited_swiglu")
UNGATED_ACTIVATIONS = ("relu", "gelu", "silu", "relu2")
ACTIVATIONS = GATED_ACTIVATIONS + UNGATED_ACTIVATIONS

# How the always-on FFN joins the routed sum. "none" goes with shared_experts = 0.
#   add              FFN + MoE (DeepSeekMoE, Kimi, GLM)      residual      the same, of a whole dense FFN (OpenMoE)
#   sigmoid_gate     sigmoid(w x) FFN + MoE (Qwen)           parallel      FFN of another input + MoE (Arctic)
#   learned_mix      a softmax of two weighs MoE and FFN (DeepSpeed's Residual-MoE, arXiv 2201.05596)
#   cmr              (1 - g) FFN + g MoE, g = sigmoid(w x) (NLLB)
#   scaled_residual  (FFN + MoE) / sqrt(2) (Grok-2)
SHARED_COMBINES = (
    "none", "add", "sigmoid_gate", "residual", "scaled_residual", "parallel", "learned_mix", "cmr",
)  # fmt: skip
SHARED_GATES = {"sigmoid_gate": 1, "cmr": 1, "learned_mix": 2}  # rows of the map that weighs the FFN


@dataclass(frozen=True)
class RouterSpec:
    """How a token chooses its experts.

    Attributes:
        kind: a name in `moebench.catalogue.routers.ROUTERS`.
        normalise: whether the K selected weights are divided by their sum.
        scale: factor on the weights after normalisation (routed_scaling_factor).
        groups: number of expert groups (1: no grouping); of two-level routers the first level, of locality_bias nodes.
        topk_groups: how many groups a token may choose from.
        logit_bias: whether the router's linear map has a bias (gpt-oss).
        training: whether it routes as in training, with noise and batch-wide assignment, or as in inference.
        slots: slots an expert, of Soft MoE.
        zero_experts: further experts that return their input (LongCat-Flash).
    """

    kind: str = "softmax_topk"
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    logit_bias: bool = False
    training: bool = False
    slots: int = 1
    zero_experts: int = 0


@dataclass(frozen=True)
class LayerSpec:
    """One MoE layer, exactly.

    Attributes:
        hidden_size: D.
        expert_ffn_size: F, the inner width of one routed expert.
        routed_experts: E.
        top_k: K, experts each token goes to.
        activation: one of `ACTIVATIONS`; the gated ones have two input maps.
        activation_limit: where limited_swiglu clamps (DeepSeek-V4: 10); None for the others.
        expert_bias: whether the experts' linear maps carry biases.
        router: how tokens choose.
        shared_experts: number of always-on experts (0: none).
        shared_ffn_size: inner width of one shared expert.
        shared_combine: one of `SHARED_COMBINES`.
        shared_activation: of the shared experts where it is not the routed ones' (Hy V4), as gated as that; or None.
    """

    hidden_size: int
    expert_ffn_size: int
    routed_experts: int
    top_k: int
    activation: str = "swiglu"
    activation_limit: float | None = None
    expert_bias: bool = False
    router: RouterSpec = field(default_factory=RouterSpec)
    shared_experts: int = 0
    shared_ffn_size: int = 0
    shared_combine: str = "none"
    shared_activation: str | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "expert_ffn_size", "routed_experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.top_k > self.routed_experts:
            raise ValueError(f"top_k is {self.top_k}, more than the {self.routed_experts} routed experts")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.shared_combine not in SHARED_COMBINES:
            raise ValueError(f"shared_combine {self.shared_combine!r} is not one of {', '.join(SHARED_COMBINES)}")
        other = self.shared_activation
        if other is not None and (other not in ACTIVATIONS or (other in GATED_ACTIVATIONS) != self.gated):
            raise ValueError(f"shared_activation {other!r} does not go with activation {self.activation!r}")
        if (self.shared_experts > 0) != (self.shared_combine != "none"):
            raise ValueError("shared_experts and shared_combine must both be set or both be absent")
        if (self.activation_limit is not None) != (self.activation == "limited_swiglu"):
            raise ValueError("activation_limit goes with limited_swiglu, and with it alone")

    @property
    def gated(self) -> bool:
        """Whether an expert is down(act(gate(x)) * up(x)) rather than down(act(up(x)))."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def choices(self) -> int:
        """What a router chooses among: the routed experts, and zero experts where there are some."""
        return self.routed_experts + self.router.zero_experts

    @property
    def shared_width(self) -> int:
        """Inner width of all shared experts together (they run fused)."""
        return self.shared_experts * self.shared_ffn_size

    def expert_params(self) -> int:
        """Parameters of one routed expert."""
        return ffn_params(self.hidden_size, self.expert_ffn_size, gated=self.gated, bias=self.expert_bias)

    def router_params(self) -> int:
        """Parameters of the gate (auxiliary selection biases are not counted)."""
        return gate_params(self)

    def shared_params(self) -> int:
        """Parameters of the shared experts and of the gate on them."""
        gate = self.hidden_size * SHARED_GATES.get(self.shared_combine, 0)
        return ffn_params(self.hidden_size, self.shared_width, gated=self.gated) + gate if self.shared_width else 0

    def total_params(self) -> int:
        """All parameters of the layer."""
        return self.routed_experts * self.expert_params() + self.router_params() + self.shared_params()

    def active_params(self) -> int:
        """Parameters one token meets."""
        return self.top_k * self.expert_params() + self.router_params() + self.shared_params()


def ffn_params(hidden_size: int, ffn_size: int, *, gated: bool, bias: bool = False) -> int:
    """Parameters of one feed-forward network D -> F -> D."""
    in_maps = 2 if gated else 1
    weights = (in_maps + 1) * hidden_size * ffn_size
    return weights + (in_maps * ffn_size + hidden_size if bias else 0)


@dataclass(frozen=True)
class MoELayers:
    """`count` identical MoE layers of a model; `name` tells kinds apart ("" when there is one kind)."""

    name: str
    layer: LayerSpec
    count: int


@dataclass(frozen=True)
class ModelSpec:
    """A published model, or one read from a config.json.

    Parameter totals in absolute numbers; null where the facts do not give them.

    Attributes:
        id: the preset's name.
        title: the name it was published under.
        year: of publication.
        layers: its MoE layer kinds; empty where it is not known to the layer.
        computed_total / computed_active: parameters from the arithmetic of the architecture.
        published_total / published_active: as its makers state them.
        alias_of: id of the identical preset, if any.
        unavailable: why no layer can be built (undisclosed, partly known); null for presets.
        uncounted: why computed_total is null, or what it leaves out; null where everything is counted.
        source: where the numbers come from.
        notes: what a reader should know.
    """

    id: str
    title: str
    year: int | None
    layers: tuple[MoELayers, ...]
    computed_total: int | None = None
    computed_active: int | None = None
    published_total: float | None = None
    published_active: float | None = None
    alias_of: str | None = None
    unavailable: str | None = None
    uncounted: str | None = None
    source: str = ""
    notes: str = ""

    @property
    def moe_layers(self) -> int:
        """How many MoE layers the model has."""
        return sum(kind.count for kind in self.layers)
