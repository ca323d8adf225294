"""Quantised precisions: the same quantised weights for everyone, judged as asked for, and refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from core_arms import arm_of, assert_says, bench_of, layer_of, user_kernel, verdict_of

from moebench import oracle
from moebench.derive import performance
from moebench.measure.ceilings import measure_ceilings
from moebench.measure.errors import REL_TOLERANCE
from moebench.point import PRECISIONS, QUANTISED_PRECISIONS, STAGES, Capacity, Problem, Variant, base_precision
from moebench.providers.base import ExpertsProvider
from moebench.providers.case import Case
from moebench.providers.load import Unavailable, load
from moebench.refusal import refusal
from moebench.weights import make_weights, weight_bytes
from moebench.work import expert_bytes, held_bytes, matrix_bytes, point_work
from moebench.worker import Worker

LAYER = layer_of(experts=4, top_k=2, hidden=64, ffn=48)


def case_of(precision: str, *, direction: str = "forward", scope: str = "experts") -> Case:
    return Case(LAYER, 8, direction, precision, Capacity(), scope, "cpu")


def test_the_kernels_know_these_precisions() -> None:
    from moebench_kernels import quantise

    assert QUANTISED_PRECISIONS == quantise.KINDS
    assert set(REL_TOLERANCE) == set(PRECISIONS)
    assert {base_precision(name) for name in QUANTISED_PRECISIONS} == {"bf16"}


@pytest.mark.parametrize("precision", QUANTISED_PRECISIONS)
@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (130, 300), (1, 2)])
def test_bytes_are_those_of_the_tensors(precision: str, rows: int, columns: int) -> None:
    from moebench_kernels import quantise_weights

    made = quantise_weights(torch.randn(3, rows, columns), precision)
    assert made.nbytes == 3 * matrix_bytes(rows, columns, precision)


@pytest.mark.parametrize("precision", QUANTISED_PRECISIONS)
def test_weights_are_bf16_ones_quantised_once(precision: str) -> None:
    plain, made = (make_weights(LAYER, name, "cpu", 3) for name in ("bf16", precision))
    assert all(torch.equal(value, made.tensors()[name]) for name, value in plain.tensors().items())
    assert made.quantised is not None
    assert made.experts == made.quantised
    assert made.unquantised().experts == (made.w_gate_up, made.w_down)
    held = sum(value.nbytes for value in made.tensors().values())
    assert weight_bytes(LAYER, precision) == held_bytes(LAYER, precision) == held
    again = make_weights(LAYER, precision, "cpu", 3).tensors()
    assert all(torch.equal(value.float(), again[name].float()) for name, value in made.tensors().items())


@pytest.mark.parametrize("precision", QUANTISED_PRECISIONS)
def test_the_oracle_answers_for_the_quantised_weights(precision: str) -> None:
    from moebench_kernels import dequantise_weights

    made = make_weights(LAYER, precision, "cpu", 0)
    assert made.quantised is not None
    up, down = (dequantise_weights(q, torch.float64) for q in made.quantised)
    x, ids, gates = torch.randn(5, 64).double(), torch.rand(5, 4).argsort(1)[:, :2], torch.rand(5, 2).double()
    asked = oracle.experts(LAYER, made, x, ids, gates)
    dequantised = replace(made.unquantised(), w_gate_up=up, w_down=down)
    assert torch.equal(asked, oracle.experts(LAYER, dequantised, x, ids, gates))
    assert not torch.allclose(asked, oracle.experts(LAYER, made.unquantised(), x, ids, gates))


# rel_error, which is of activations alone, and fidelity_error, which is of weights too: least and most of each.
COSTS = {
    "fp8:row": ((0.02, 0.08), (0.04, 0.1)),
    "fp8:128": ((0.02, 0.08), (0.04, 0.1)),
    "int8": ((0.005, 0.04), (0.01, 0.04)),
    "w4a16:128": ((0.0, 0.03), (0.1, 0.3)),
}


@pytest.mark.parametrize("scope", ["experts", "layer"])
@pytest.mark.parametrize("precision", QUANTISED_PRECISIONS)
def test_triton_against_the_oracle(precision: str, scope: str) -> None:
    try:
        provider = load("triton")
    except Unavailable as missing:
        pytest.skip(f"triton provider unavailable: {missing}")
    if not provider.interpreted("cpu"):
        pytest.skip("kernels are compiled here, not interpreted")
    verdict = verdict_of("triton", LAYER, 9, precision=precision, scope=scope)
    assert verdict.wrong is None
    (rel, most_rel), (fidelity, most_fidelity) = COSTS[precision]
    assert verdict.rel_error is not None
    assert verdict.fidelity_error is not None
    assert rel <= verdict.rel_error <= most_rel
    assert fidelity <= verdict.fidelity_error <= most_fidelity


@pytest.mark.parametrize("scope", ["experts", "layer"])
@pytest.mark.parametrize("precision", QUANTISED_PRECISIONS)
def test_the_baseline_dequantises(precision: str, scope: str) -> None:
    """torch-loop leaves activations alone: as exact as bf16, and as far from the unquantised layer as its weights."""
    verdict = verdict_of("torch-loop", LAYER, 9, precision=precision, scope=scope)
    assert verdict.wrong is None
    assert verdict.rel_error is not None
    assert verdict.fidelity_error is not None
    assert verdict.rel_error < REL_TOLERANCE["bf16"]
    assert verdict.fidelity_error > 1.5 * verdict.rel_error


def test_dropping_is_seen_beside_quantising() -> None:
    found = [
        verdict_of("torch-loop", LAYER, 40, precision="int8", capacity=c).fidelity_error for c in ("dropless", 0.5)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0] < 0.05 < 0.2 < found[1]


def wrong_scales(x, ids, weights, w_gate_up, w_down, **options):  # type: ignore[no-untyped-def]
    """torch-loop on scales of another row or block."""
    from moebench.providers import torch_loop

    moved = w_gate_up._replace(scales=w_gate_up.scales.roll(1, 1))
    return torch_loop.experts(x, ids, weights, moved, w_down, **options)


def quantises_weights_coarsely(x, ids, weights, w_gate_up, w_down, **options):  # type: ignore[no-untyped-def]
    """Ignores what was asked and takes 4 bits of its own."""
    from moebench.providers import torch_loop
    from moebench_kernels import dequantise_weights, quantise_weights

    coarse = quantise_weights(dequantise_weights(w_gate_up), "w4a16:32")
    return torch_loop.experts(x, ids, weights, coarse, w_down, **options)


@pytest.mark.parametrize(
    ("experts", "precision"),
    [(quantises_weights_coarsely, "fp8:row"), (quantises_weights_coarsely, "int8"), (wrong_scales, "w4a16:128")],
)
def test_a_wrong_answer_is_caught(experts: object, precision: str) -> None:
    provider = ExpertsProvider("wrong", experts, precisions=PRECISIONS)  # type: ignore[arg-type]
    assert_says("against the float64 oracle", verdict_of(provider, LAYER, 9, precision=precision).wrong)


def test_changed_quantised_weights_are_put_right() -> None:
    def spoils(x, ids, weights, w_gate_up, w_down, **options):  # type: ignore[no-untyped-def]
        w_gate_up.values.view(torch.uint8).zero_()
        return torch.zeros_like(x)

    bench = bench_of(LAYER, 8, precision="fp8:row")
    before = bench.weights.tensors()["quantised w_gate_up"].clone()
    arm = arm_of(ExpertsProvider("spoils", spoils, precisions=PRECISIONS), bench, precision="fp8:row")
    assert arm.check().wrong == "changed the layer's quantised w_gate_up"
    assert torch.equal(bench.weights.tensors()["quantised w_gate_up"].view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("name", ["torch-bmm", "torch-dense", "torch-grouped", "torch-compile", "dense-ffn"])
def test_others_refuse_by_name(name: str) -> None:
    provider = load(name)
    for precision in QUANTISED_PRECISIONS:
        assert_says(rf"{name} .*not {precision}", provider.refuse(case_of(precision)))
    for name in ("torch-loop", "triton"):
        assert load(name).refuse(case_of("fp8:row")) is None


def test_a_users_function_takes_them_when_it_says_so() -> None:
    provider = load(user_kernel("right"))
    assert_says("takes precisions fp32, bf16, fp16, not int8", provider.refuse(case_of("int8")))

    def mine(x, ids, weights, w_gate_up, w_down):  # type: ignore[no-untyped-def]
        raise AssertionError

    mine.precisions = ("int8",)  # type: ignore[attr-defined]
    from moebench.providers.load import from_function

    assert from_function("mine", mine).refuse(case_of("int8")) is None
    assert_says("'fp8:row' is not among them", from_function("mine", mine).refuse(case_of("fp8:row")))


def test_a_device_without_fp8_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    import moebench_kernels

    lacks = "fp8:row needs compute capability 8.9 or newer; this is an NVIDIA A100 (8.0)"
    monkeypatch.setattr(moebench_kernels, "supported", lambda kind, device: lacks if kind == "fp8:row" else None)
    assert load("triton").refuse(case_of("fp8:row")) == lacks
    assert load("triton").refuse(case_of("int8")) is None
    assert Worker().yardstick(0, "gemm", "fp8:row", 1e6) == {"not_applicable": lacks}


@pytest.mark.parametrize("precision", QUANTISED_PRECISIONS)
def test_what_they_cannot_do_is_said_first(precision: str) -> None:
    variant, problem = Variant("triton", precision, scope="experts"), Problem("custom", LAYER, 8)
    assert refusal(problem, variant) is None
    backward = replace(problem, direction="forward_backward")
    assert_says(f"precision '{precision}' is forward only", refusal(backward, variant))
    for scope in STAGES:
        assert_says("scopes 'layer' and 'experts' can be run", refusal(problem, replace(variant, scope=scope)))
    odd = refusal(replace(problem, layer=replace(LAYER, expert_ffn_size=47)), variant)
    assert (odd is None) == (precision != "w4a16:128")


@pytest.mark.parametrize("precision", QUANTISED_PRECISIONS)
def test_s_mbu_counts_scales_per_tensor(precision: str) -> None:
    problem, variant = Problem("custom", LAYER, 8), Variant("triton", precision)
    work = point_work(problem, variant, active_experts=3.0)
    up, down = expert_bytes(LAYER, precision)
    router = 4 * 64 * 2
    assert work.weight_bytes == 3 * (up + down) + router
    assert work.input_bytes == work.output_bytes == 8 * 64 * 2
    assert work.flops == point_work(problem, Variant("triton", "bf16"), active_experts=3.0).flops
    half = {"w4a16:128": 0.5}.get(precision, 1.0)
    values = 3 * 64 * 48 * half
    assert values < up + down < 1.3 * values, "a layer this small has many scales, but not that many"
    assert performance(1.0, work, problem, variant, None)["gbytes_per_s"] == pytest.approx(work.compulsory_bytes / 1e6)


def test_ceilings_know_every_precision() -> None:
    found = measure_ceilings("cpu", QUANTISED_PRECISIONS, seconds_per_probe=0.02)
    for precision in QUANTISED_PRECISIONS:
        rate = found["gemm_tflops"][precision]
        # Where PyTorch has no such GEMM on this machine the figure is null, with its reason.
        assert (rate is None) == (f"gemm_{precision}" in found["reasons"])
        assert rate is None or rate > 0
    assert found["gemm_tflops"]["w4a16:128"], "16-bit products, which every machine has"
