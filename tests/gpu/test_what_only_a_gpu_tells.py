"""What reading and stand-ins cannot settle: run these first on a new GPU (`pytest -m gpu tests/gpu`).

If `test_rows_and_weights_past_two_billion_numbers` fails, keep no number of a large shape.
"""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import silu

import moebench_kernels as kernels
from moebench.measure import cuda, latency
from moebench.yardsticks import make_yardstick
from moebench_kernels.grouped_gemm import launch_grouped_gemm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    yield
    torch.cuda.empty_cache()


def normal(*shape, std=1.0):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * std


def choices(tokens, experts, top_k):
    return torch.stack([torch.randperm(experts, device="cuda")[:top_k] for _ in range(tokens)])


def apart(y, want):
    return float((y.double() - want.double()).norm() / want.double().norm())


def test_graphs_of_two_arms_share_a_pool_and_one_after_them_has_its_own():
    a = normal(2048, 2048)
    want = a @ a
    first, second = (latency.make_timer("cuda", lambda index: a @ a, 4) for _ in range(2))
    assert (first.name, second.name) == ("cuda_graph", "cuda_graph"), (first.why, second.why)
    assert len(cuda._SHARED.graphs) == 8
    for timer in (first, second, first):
        assert torch.equal(timer.once(None, 0), want)
    del timer, first, second
    again = latency.make_timer("cuda", lambda index: a @ a, 4)
    assert again.name == "cuda_graph", again.why  # the handle of a pool that is gone would raise


def test_a_capture_that_is_cut_short_leaves_the_allocator_well():
    x = torch.ones(1 << 20, device="cuda")

    def waits(index):
        torch.cuda.synchronize()
        return x.sum()

    assert latency.make_timer("cuda", waits, 2).name != "cuda_graph"
    assert latency.make_timer("cuda", lambda index: x * 2, 4).name == "cuda_graph"
    free = torch.cuda.mem_get_info()[0]
    held = [torch.empty(int(free * 0.45), dtype=torch.uint8, device="cuda") for _ in range(2)]
    del held
    torch.empty(int(free * 0.8), dtype=torch.uint8, device="cuda")  # only what is cached can give this much


def test_a_backward_pass_is_captured():
    experts, hidden, ffn, tokens, top_k = 8, 512, 256, 1024, 2
    w_gate_up = normal(experts, 2 * ffn, hidden, std=0.05).requires_grad_()
    w_down = normal(experts, hidden, ffn, std=0.05).requires_grad_()
    x, upstream = normal(tokens, hidden), normal(tokens, hidden)
    ids, weights = choices(tokens, experts, top_k), torch.rand(tokens, top_k, device="cuda")

    def call(index):
        w_gate_up.grad = w_down.grad = None
        y = kernels.moe_layer(x.detach().requires_grad_(), ids, weights, w_gate_up, w_down)
        y.backward(upstream)
        return y

    timer = latency.make_timer("cuda", call, 4)
    assert timer.name == "cuda_graph", timer.why


def test_rows_and_weights_past_two_billion_numbers():
    """Mixtral's hidden rows at 262k assignments are 3.8e9 numbers, DeepSeek-V3's w_gate_up is 7.5e9."""
    tokens, top_k, experts, ffn, hidden = 131072, 2, 8, 14336, 256
    ids = choices(64, experts, top_k).repeat(tokens // 64, 1)
    plan = kernels.routing_plan(ids, experts)
    x, w_gate_up = normal(tokens, hidden), normal(experts, 2 * ffn, hidden, std=hidden**-0.5)
    rows, _ = launch_grouped_gemm(x, w_gate_up, plan, gather=True, activation="swiglu")
    for row in (0, tokens * top_k // 2, tokens * top_k - 1):
        z = x[int(plan.row2token[row])].float() @ w_gate_up[int(plan.row2expert[row])].float().T
        assert apart(rows[row], silu(z[:ffn]) * z[ffn:]) < 0.02, row


@pytest.mark.parametrize("tokens", [1024, 64])
def test_a_layer_of_seven_billion_weights(tokens):
    """The last expert's answer, as a grouped GEMM and as a decoding batch."""
    top_k, experts, ffn, hidden = 8, 256, 2048, 7168
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB")
    shape = (experts, 2 * ffn, hidden)
    w_gate_up = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(std=hidden**-0.5)
    w_down = torch.empty(experts, hidden, ffn, device="cuda", dtype=torch.bfloat16).normal_(std=ffn**-0.5)
    assert abs(float(w_gate_up[-1].float().std()) * hidden**0.5 - 1) < 0.02
    ids = choices(tokens, experts - 1, top_k)
    ids[-1, 0] = experts - 1
    x, weights = normal(tokens, hidden), torch.rand(tokens, top_k, device="cuda")
    y = kernels.moe_layer(x, ids, weights, w_gate_up, w_down)
    want = torch.zeros(hidden, device="cuda")
    for expert, weight in zip(ids[-1].tolist(), weights[-1].tolist(), strict=True):
        z = x[-1].float() @ w_gate_up[expert].float().T
        want += weight * (w_down[expert].float() @ (silu(z[:ffn]) * z[ffn:]).bfloat16().float())
    assert apart(y[-1], want) < 0.03


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "ffn"),
    [(3, 1, 2, 128, 64), (5, 2, 4, 2880, 2880), (300, 4, 4, 2880, 2880)],
)
def test_tiles_larger_than_what_they_are_laid_over(tokens, top_k, experts, hidden, ffn):
    """TMA boxes of 16 to 128 rows over fewer; 2880, gpt-oss' width, in blocks of 128; with and without gathering."""
    ids, weights = choices(tokens, experts, top_k), torch.rand(tokens, top_k, device="cuda")
    x = normal(tokens, hidden)
    w_gate_up = normal(experts, 2 * ffn, hidden, std=hidden**-0.5)
    w_down = normal(experts, hidden, ffn, std=ffn**-0.5)
    plan = kernels.routing_plan(ids, experts)
    want = kernels.moe_layer_torch(x.double(), ids, weights.double(), w_gate_up.double(), w_down.double())
    hidden_rows = kernels.up_projection(kernels.permute(x, plan), w_gate_up, plan, permuted=True)
    answers = {
        "layer": kernels.moe_layer(x, ids, weights, w_gate_up, w_down),
        "layer of a plan": kernels.moe_layer(x, ids, weights, w_gate_up, w_down, plan=plan),
        "stages": kernels.combine(kernels.down_projection(hidden_rows, w_down, plan), weights, plan),
    }
    assert {name: y for name, y in answers.items() if apart(y, want) > 0.02} == {}


@pytest.mark.parametrize("side", [40, 1000, 4104])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "fp8:row", "int8"])
def test_the_dense_gemm_of_every_precision_and_size(precision, side):
    gemm = make_yardstick("gemm", precision=precision, device="cuda", flops=2.0 * side**3, cache_bytes=0)
    assert gemm.check()[1] is None


def test_a_lost_device_is_told_from_one_that_works():
    code = """
import torch
from moebench.measure.faults import device_is_lost
x = torch.zeros(4, device="cuda")
print(device_is_lost())
try:
    x[torch.tensor([10**6], device="cuda")].sum().item()
except Exception:
    pass
print(device_is_lost())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr[-500:]
