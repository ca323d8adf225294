"""The kernels inside transformers: models that are saved, loaded and run on them give eager's answers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moebench_kernels import interpreting
from moebench_kernels.transformers_experts import (
    activation_of,
    expert_tensors,
    experts_forward,
    forget_converted,
    register_transformers,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
moe = pytest.importorskip("transformers.integrations.moe", reason="transformers is older than 5.0")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

DEVICE = "cpu" if interpreting() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no GPU, and triton was imported without TRITON_INTERPRET=1", allow_module_level=True)
# A large spread of the initial weights: with the usual 0.02 the experts would hardly reach the logits.
SMALL = {"vocab_size": 48, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
         "max_position_embeddings": 32, "num_hidden_layers": 1, "initializer_range": 0.4}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
MODELS = {
    "mixtral": ("MixtralConfig", {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3MoeConfig", {"moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 3,
                                     "head_dim": 16}),
    "deepseek-v3": ("DeepseekV3Config", {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
                                         "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0,
                                         "n_shared_experts": 1, **LATENT}),
    "olmoe": ("OlmoeConfig", {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}),
    "gpt-oss": ("GptOssConfig", {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
                                 "head_dim": 16, "layer_types": ["full_attention"]}),
}  # fmt: skip
TOKENS = torch.tensor([[3, 17, 40, 8, 29], [11, 5, 5, 44, 1]])


@pytest.fixture(autouse=True)
def _registered():
    """Registering is process-wide: it is undone here."""
    before = dict(moe.ExpertsInterface._global_mapping)
    register_transformers()
    yield
    moe.ExpertsInterface._global_mapping.clear()
    moe.ExpertsInterface._global_mapping.update(before)


@pytest.fixture
def pair(tmp_path):
    """Of one saved model: loaded with eager experts, and with ours."""

    def pair(name):
        config, sizes = MODELS[name]
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**SMALL, **sizes))
        for parameter in model.parameters():  # biases start at zero, where no mistake with them would show
            if parameter.detach().abs().max() == 0:
                nn.init.normal_(parameter, std=0.4)
        model.save_pretrained(tmp_path)
        load = transformers.AutoModelForCausalLM.from_pretrained
        eager, ours = (load(tmp_path, experts_implementation=how).to(DEVICE) for how in ("eager", "moebench"))
        assert ours.config._experts_implementation == "moebench"
        return eager, ours

    return pair


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_eager_s_logits_gradients_and_tokens(name, pair):
    eager, ours = pair(name)
    tokens = TOKENS.to(DEVICE)
    for model in (eager, ours):
        model.train()
        model(tokens, labels=tokens).loss.backward()
    wanted = {key: parameter.grad for key, parameter in eager.named_parameters()}
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[key], rtol=1e-4, atol=1e-5, msg=lambda text, k=key: k + text)
    with torch.no_grad():
        logits = [model.eval()(tokens).logits for model in (eager, ours)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    written = [model.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0) for model in (eager, ours)]
    assert torch.equal(*written)
    expert_grads = [grad for key, grad in wanted.items() if "experts" in key]
    assert all(grad.abs().max() > 1e-3 for grad in expert_grads)  # or this test would compare noise


class Experts(nn.Module):
    """Experts of any layout that transformers knows, as its decorator marks them."""

    def __init__(self, act_fn=torch.nn.functional.silu, transposed=False, concatenated=True, gate=True, norm=False):
        super().__init__()
        E, D, F = 4, 16, 8
        generator = torch.Generator().manual_seed(1)
        shapes = {"gate_up_proj" if gate else "up_proj": (2 * F if gate else F, D), "down_proj": (D, F)}
        for name, (rows, columns) in shapes.items():
            shape = (E, columns, rows) if transposed else (E, rows, columns)
            setattr(self, name, nn.Parameter((torch.randn(shape, generator=generator) * 0.3).to(DEVICE)))
        self.num_experts, self.act_fn, self.config = E, act_fn, SimpleNamespace(hidden_act="silu")
        self.has_gate, self.has_bias, self.has_post_expert_norm = gate, False, norm
        self.is_transposed, self.is_concatenated, self._is_expert_parallel = transposed, concatenated, True

    def _apply_gate(self, gate_up):
        halves = gate_up.chunk(2, dim=-1) if self.is_concatenated else (gate_up[..., 0::2], gate_up[..., 1::2])
        return self.act_fn(halves[0]) * halves[1]


def inputs(tokens=5, *, offset=0):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, 16, generator=generator)
    ids = torch.rand(tokens, 4, generator=generator).argsort(dim=1)[:, :2] + offset
    return x.to(DEVICE), ids.to(DEVICE), torch.rand(tokens, 2, generator=generator).to(DEVICE)


def agrees(module, x, ids, weights):
    """As transformers' own batched function, forward and gradients."""
    found = []
    for function in (experts_forward, moe.batched_mm_experts_forward):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        module.zero_grad()
        y = function(module, leaves[0], ids, leaves[1])
        y.square().sum().backward()
        found.append([y.detach(), *(leaf.grad for leaf in leaves), *(p.grad.clone() for p in module.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


LAYOUTS = [
    {"transposed": True},
    {"concatenated": False},
    {"transposed": True, "concatenated": False},
    {"gate": False, "act_fn": nn.ReLU()},
    {"gate": False, "act_fn": nn.GELU(), "transposed": True},
    {"act_fn": nn.GELU()},
]


@pytest.mark.parametrize("flags", LAYOUTS, ids=str)
def test_layouts(flags):
    agrees(Experts(**flags), *inputs())


def test_experts_of_another_rank_are_dropped():
    x, ids, weights = inputs(offset=1)  # ids run to 4, which is no expert of this module
    weights = weights.masked_fill(ids >= 4, 0)
    assert (ids == 4).any()
    agrees(Experts(), x, ids, weights)
    module = Experts()
    heavy = experts_forward(module, x, ids, weights.masked_fill(ids >= 4, 9.0))  # dropped whatever their weight
    torch.testing.assert_close(heavy, experts_forward(module, x, ids, weights))


def test_hidden_states_of_another_dtype_come_back_in_it():
    module = Experts().half()
    x, ids, weights = inputs()
    y = experts_forward(module, x, ids, weights)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, experts_forward(Experts(), x, ids, weights), rtol=2e-2, atol=2e-2)


def test_converted_weights_follow_the_parameters():
    module = Experts(transposed=True).requires_grad_(False)
    first = expert_tensors(module)["w_down"]
    assert expert_tensors(module)["w_down"] is first
    module.down_proj.mul_(2)
    assert torch.equal(expert_tensors(module)["w_down"], first * 2)
    module.down_proj.data = module.down_proj.data * 2
    assert torch.equal(expert_tensors(module)["w_down"], first * 4)
    module.down_proj = nn.Parameter(module.down_proj.detach() * 2, requires_grad=False)
    assert torch.equal(expert_tensors(module)["w_down"], first * 8)
    plain = Experts()
    assert expert_tensors(plain)["w_down"].data_ptr() == plain.down_proj.data_ptr()


def test_what_leaves_no_trace_is_seen_after_training_or_when_told():
    module = Experts(transposed=True)
    with torch.no_grad():
        first = expert_tensors(module)["w_down"]
    expert_tensors(module)  # a step of training
    module.down_proj.data.mul_(2)  # as averaging of weights does
    with torch.no_grad():
        assert torch.equal(expert_tensors(module)["w_down"], first * 2)
        module.down_proj.data.mul_(2)
        forget_converted(nn.Sequential(module))
        assert torch.equal(expert_tensors(module)["w_down"], first * 4)
    with torch.inference_mode():
        made_there = Experts(transposed=True).requires_grad_(False)
        before = expert_tensors(made_there)["w_down"].clone()
        made_there.down_proj.mul_(2)
        assert torch.equal(expert_tensors(made_there)["w_down"], before * 2)
    with pytest.raises(TypeError, match=r"model is a str; an nn\.Module is needed"):
        forget_converted("model")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Experts(act_fn=nn.GELU(approximate="tanh")), r"Experts computes an activation \(GELU\) that is none of"),
        (Experts(act_fn=lambda gate: nn.functional.silu(gate).clamp(max=1e5)), "none of the kernels'"),
        (Experts(gate=False, act_fn=lambda z: z.relu().square()), "none of the kernels'"),
        (Experts(gate=False, act_fn=nn.functional.silu, norm=True), "normalises each expert's answer"),
    ],
    ids=["tanh gelu", "a far clamp", "squared relu", "post norm"],
)
def test_what_the_kernels_do_not_compute_is_refused(module, reason):
    with pytest.raises(NotImplementedError, match=reason):
        experts_forward(module, *inputs())


def test_the_activation_is_found_by_what_the_module_does():
    misnamed = Experts(act_fn=nn.GELU())  # whose config says silu
    assert activation_of(misnamed) == "geglu"


def test_where_no_kernel_can_run_there_is_an_error(monkeypatch):
    monkeypatch.setattr("moebench_kernels.checks.triton_available", lambda: (False, "no triton here"))
    with pytest.raises(ValueError, match="no triton here"):
        experts_forward(Experts(), *inputs())


@pytest.mark.parametrize("transposed", [False, True])
def test_it_compiles_whole(transposed):
    module = Experts(transposed=transposed).requires_grad_(False)
    x, ids, weights = inputs()
    compiled = torch.compile(lambda *given: experts_forward(module, *given), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, ids, weights), experts_forward(module, x, ids, weights))


def test_names():
    register_transformers()  # twice is once
    register_transformers("other")
    assert moe.ALL_EXPERTS_FUNCTIONS["other"] is experts_forward
    with pytest.raises(TypeError, match="name is None; a text is needed"):
        register_transformers(None)
    for taken in ("eager", "grouped_mm"):
        with pytest.raises(ValueError, match=f"already has an experts implementation '{taken}'"):
            register_transformers(taken)
