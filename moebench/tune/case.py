"""What is tuned: one product of the experts' GEMMs at one block_m, or one weight gradient, under one load.

Tiles are kept by (kind, dtype, block_m, N, K); of several loads with the same key the largest is raced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moebench.catalogue.models import resolve_layer
from moebench.catalogue.spec import GATED_ACTIVATIONS, LayerSpec

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
MAPS = ("up", "down", "d_hidden", "d_rows", "dw_up", "dw_down")
FORWARD = ("up", "down")


@dataclass(frozen=True)
class Case:
    """One grouped GEMM of an MoE layer.

    Attributes:
        layer: name of the layer it comes from.
        map: "up" and "down", or of the backward "d_hidden" (dy through W_down), "d_rows" (dz through W_gate_up),
            "dw_up" and "dw_down" (the gradients of the matrices).
        kind: as moebench_kernels.tiles and ragged_tiles list tiles.
        dtype: "bf16", "fp16" or "fp32".
        block_m: rows of a tile, from the mean load; of a weight gradient only a name for that load.
        n, k: columns of a map, and the inner size; of a weight gradient its columns and rows.
        experts, top_k, tokens: E, K, T of the load it is raced under.
        activation: of the epilogue; None where there is none.
    """

    layer: str
    map: str
    kind: str
    dtype: str
    block_m: int
    n: int
    k: int
    experts: int
    top_k: int
    tokens: int
    activation: str | None

    @property
    def weight_gradient(self) -> bool:
        """Whether it is a gradient of the matrices, whose sums go over an expert's rows."""
        return self.kind.startswith("dw")

    @property
    def gather(self) -> bool:
        """Whether rows are gathered from tokens while they are loaded."""
        return "gather" in self.kind

    @property
    def transpose(self) -> bool:
        """Whether the weights lie as [E, inner, columns]."""
        return self.kind.endswith("_t")

    @property
    def maps(self) -> int:
        """2 where one tile holds gate and up columns."""
        return 2 if self.kind.startswith("gated") else 1

    @property
    def rows(self) -> int:
        """T*K."""
        return self.tokens * self.top_k

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """What a tuned file tells tiles apart by."""
        return self.kind, DTYPES[self.dtype], self.block_m, self.n, self.k

    @property
    def name(self) -> str:
        """In a few words."""
        return f"{self.layer} {self.map} T={self.tokens} {self.dtype} ({self.kind}, m{self.block_m}, {self.n}x{self.k})"


def layers_of(models: Sequence[str], shapes: Sequence[str]) -> dict[str, LayerSpec]:
    """Presets by name, and shapes given as E,D,F,K.

    Raises:
        ValueError: an unknown model or a malformed shape.
    """
    found = {name: resolve_layer(name)[1].layer for name in models}
    for text in shapes:
        parts = text.split(",")
        if len(parts) != 4 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"--shape {text!r} is not E,D,F,K: four whole numbers from 1, such as 128,2048,768,8")
        E, D, F, K = map(int, parts)
        found[text] = LayerSpec(hidden_size=D, expert_ffn_size=F, routed_experts=E, top_k=K)
    return found


def cases(
    layers: dict[str, LayerSpec], tokens: Iterable[int], dtypes: Iterable[str], *, backward: bool = False
) -> list[Case]:
    """Every product of the layers under these loads, each key once, under its largest load."""
    every = [
        case
        for name, layer in layers.items()
        for T in sorted(tokens)
        for dtype in dtypes
        for case in _of_layer(name, layer, T, dtype, MAPS if backward else FORWARD)
    ]
    return list({case.key: case for case in sorted(every, key=lambda case: case.rows)}.values())


def _of_layer(name: str, layer: LayerSpec, T: int, dtype: str, maps: Iterable[str]) -> list[Case]:
    from moebench_kernels import ACTIVATIONS
    from moebench_kernels.ragged_tiles import ragged_kind
    from moebench_kernels.tiles import gemm_kind, tile_rows

    if layer.activation not in ACTIVATIONS:
        raise ValueError(f"{name}: the kernels do not compute activation {layer.activation!r}")
    D, F, E, K = layer.hidden_size, layer.expert_ffn_size, layer.routed_experts, layer.top_k
    gated = layer.activation in GATED_ACTIVATIONS
    width = 2 * F if gated else F
    shapes = {  # map -> gather, gated, transpose, columns of a map, inner size
        "up": (True, gated, False, F, D),
        "down": (False, False, False, D, F),
        "d_hidden": (True, False, True, F, D),
        "d_rows": (False, False, True, D, width),
    }
    kinds = {each: gemm_kind(*shape[:3]) for each, shape in shapes.items()}
    sizes = {each: shape[3:] for each, shape in shapes.items()} | {"dw_up": (D, width), "dw_down": (F, D)}
    kinds |= {"dw_up": ragged_kind(False, True), "dw_down": ragged_kind(True, False)}
    found = []
    for each in maps:
        (n, k), kind, activation = sizes[each], kinds[each], layer.activation if each == "up" else None
        found.append(Case(name, each, kind, dtype, tile_rows(T * K / E), n, k, E, K, T, activation))
    return found
