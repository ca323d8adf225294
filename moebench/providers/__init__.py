"""Every provider, listed once: name -> the module attribute that holds it. No torch until one is loaded.

A provider may also be `path/to/file.py:function`, or the name of an entry point
in the group `moebench.providers`; both hold a function
`f(x, ids, weights, w_gate_up, w_down) -> y` (docs/providers.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from moebench.catalogue.layer_forms import LAYER_FORMS
from moebench.providers.packages import Package

ENTRY_POINT_GROUP = "moebench.providers"


@dataclass(frozen=True)
class Listing:
    """Where a provider lives and what it is.

    Attributes:
        target: "module:attribute".
        summary: one line.
        role: arm or yardstick.
        needs: the library behind it, which may be missing.
    """

    target: str
    summary: str
    role: str = "arm"
    needs: Package | None = None


def _peer(module: str, summary: str, package: Package, attribute: str = "PROVIDER") -> Listing:
    return Listing(f"moebench.providers.{module}:{attribute}", summary, needs=package)


def _form(name: str) -> Listing:
    attribute = name.replace("-", "_").upper()
    return Listing(f"moebench.providers.layer_forms:{attribute}", LAYER_FORMS[name].summary, "yardstick")


_TRANSFORMERS = Package("transformers", ("transformers",), "5.23.0", "pip install 'transformers>=5.0'", gpu=False)

PROVIDERS: dict[str, Listing] = {
    "torch-loop": Listing("moebench.providers.torch_loop:PROVIDER", "a Python loop over the experts"),
    "torch-bmm": Listing("moebench.providers.torch_bmm:PROVIDER", "capacity-padded batched GEMM (GShard style)"),
    "torch-grouped": Listing("moebench.providers.torch_grouped:PROVIDER", "torch.nn.functional.grouped_mm"),
    "torch-compile": Listing("moebench.providers.torch_compiled:PROVIDER", "torch.compile of the grouped or bmm form"),
    "torch-compile-max-autotune": Listing(
        "moebench.providers.torch_compiled:MAX_AUTOTUNE", "the same, its GEMMs chosen by a race of templates"
    ),
    "torch-dense": Listing("moebench.providers.torch_dense:PROVIDER", "all experts on all tokens, weighted"),
    "triton": Listing("moebench.providers.triton:PROVIDER", "moebench's own Triton kernels"),
    "dense-ffn": Listing(
        "moebench.providers.dense_ffn:PROVIDER", "one FFN of the same active FLOPs: the price of sparsity", "yardstick"
    ),
    # Mixtures of another form than a router over a bank of FFNs: they compute functions of their own.
    **{name: _form(name) for name in LAYER_FORMS},
    "transformers-eager": _peer("transformers", "transformers: its loop over experts", _TRANSFORMERS, "EAGER"),
    "transformers-batched-mm": _peer(
        "transformers", "transformers: bmm over weights copied per assignment", _TRANSFORMERS, "BATCHED_MM"
    ),
    "transformers-grouped-mm": _peer(
        "transformers", "transformers: sort, then torch's grouped_mm", _TRANSFORMERS, "GROUPED_MM"
    ),
    "liger": _peer(
        "liger", "Liger-Kernel: fused Triton MoE, backward too", Package("liger_kernel", ("liger-kernel",), "0.8.5")
    ),
    "moe-ops": _peer(
        "moe_ops", "moe-ops: Triton permute and grouped GEMM, TMA on Hopper", Package("moe_ops", ("moe-ops",), "0.1.0")
    ),
    "scattermoe": _peer(
        "scattermoe",
        "ScatterMoE: Triton GEMMs that gather and scatter",
        Package("scattermoe", ("scattermoe",), "0.3.0", "pip install git+https://github.com/shawntan/scattermoe"),
    ),
    "triton-kernels": _peer(
        "triton_kernels",
        "OpenAI's triton_kernels: ragged matmul with fused SwiGLU",
        Package(
            "triton_kernels", ("tokenspeed-triton-kernels", "triton_kernels", "triton-kernels"), "1.0.0.post20260510"
        ),
    ),
    "sonic-moe": _peer(
        "sonic_moe",
        "SonicMoE: CuTe kernels for Hopper and Blackwell, backward too",
        Package("sonicmoe", ("sonic-moe",), "0.1.2.post1"),
    ),
    "deepgemm": _peer(
        "deepgemm",
        "DeepGEMM: grouped bf16 GEMM over aligned groups",
        Package("deep_gemm", ("sgl-deep-gemm", "tokenspeed-deepgemm", "deep_gemm"), "0.1.2"),
    ),
    "fbgemm": _peer(
        "fbgemm",
        "FBGEMM GenAI: Triton grouped GEMM with TMA",
        Package("fbgemm_gpu", ("fbgemm-gpu-genai", "fbgemm-gpu-genai-nightly"), "1.6.0"),
    ),
    "torchao": _peer(
        "torchao", "torchao: grouped GEMM that quantises rows to fp8", Package("torchao", ("torchao",), "0.18.0")
    ),
    "vllm": _peer("vllm", "vLLM: fused_experts in Triton", Package("vllm", ("vllm",), "0.11.0")),
    "sglang": _peer(
        "sglang",
        "SGLang: fused_experts in Triton",
        Package("sglang", ("sglang",), "0.5", "pip install 'sglang>=0.5,<0.6'"),
    ),
    "flashinfer": _peer(
        "flashinfer",
        "FlashInfer: CUTLASS fused MoE",
        Package("flashinfer", ("flashinfer-python",), "0.6.18"),
    ),
    "transformer-engine": _peer(
        "transformer_engine",
        "Transformer Engine: permute and GroupedLinear",
        Package(
            "transformer_engine", ("transformer-engine",), "2.20", "pip install 'transformer-engine[pytorch]>=2.1'"
        ),
    ),
    "megablocks": _peer(
        "megablocks",
        "MegaBlocks: dropless MoE on grouped_gemm",
        Package("megablocks", ("megablocks",), "0.11.0", "pip install 'megablocks[gg]'"),
    ),
}


ALLOWED = "a name of `moebench list providers`, or path/to/file.py:function"


def is_known(name: str) -> bool:
    """Whether a suite may name it (a file reference is checked when it is loaded)."""
    return name in PROVIDERS or is_file(name) or name in entry_points()


def is_yardstick(name: str) -> bool:
    """Whether it computes another function than the layer's: measured beside the arms, never a winner."""
    return name in PROVIDERS and PROVIDERS[name].role == "yardstick"


def is_file(name: str) -> bool:
    """Whether it reads as `path/to/file.py:function`."""
    path, _, function = name.rpartition(":")
    return path.endswith(".py") and function.isidentifier()


def entry_points() -> dict[str, str]:
    """Providers that other installed distributions offer: name -> "module:attribute"."""
    from importlib.metadata import entry_points as installed

    return {entry.name: entry.value for entry in installed(group=ENTRY_POINT_GROUP)}


def unknown(name: str) -> str:
    """One line that says why the name is no provider, with the nearest one."""
    near = get_close_matches(name, [*PROVIDERS, *entry_points()], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"provider {name!r} is not known{hint} (allowed: {ALLOWED})"
