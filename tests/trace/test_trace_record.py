"""What is recorded is what the routers said, held against the published formulas on the hidden states they saw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trace_models import FAMILIES, Recorded, picks_of, save, tiny, traced

from moebench.failures import RunError
from moebench.trace_file import read_trace
from moebench.tracing import record

WINDOW = 50


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "fable.txt"
    path.write_text("A fox saw some grapes. They are surely sour, said he, and went away in the end.\n" * 2)
    return path


def router_inputs(model: nn.Module, ids: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Each MoE router and the hidden states it saw, in layers' order, from a run of our own."""
    seen: dict[str, tuple[nn.Module, list[Tensor]]] = {}
    hooks = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.lower().endswith("router") or (kind == "JetMoeTopKGating" and ".mlp." in name):
            seen[name] = (module, [])
            keep = seen[name][1].append
            hooks.append(
                module.register_forward_pre_hook(lambda m, args, keep=keep: keep(args[0].flatten(0, -2).clone()))
            )
    with torch.no_grad():
        for window in ids.split(WINDOW):
            model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [(module, torch.cat(x)) for module, x in seen.values()]


def assert_recorded(model_type: str, model: nn.Module, experts: np.ndarray, weights: np.ndarray, ids: Tensor) -> None:
    """Every token's experts and weights, as a set, in every layer."""
    inputs = router_inputs(model, ids)
    assert len(inputs) == len(experts)
    for (router, x), layer_ids, layer_weights in zip(inputs, experts, weights, strict=True):
        expected = picks_of(model_type, router, x, model.config)
        assert len(expected) == len(layer_ids)
        for token, wanted in enumerate(expected):
            found = dict(zip(layer_ids[token].tolist(), layer_weights[token].tolist(), strict=True))
            assert found == pytest.approx(dict(wanted), rel=1e-4, abs=1e-6), (router, token)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_against_their_formulas(model_type: str, tmp_path: Path, text: Path) -> None:
    model = tiny(model_type)
    trace = record(save(model, tmp_path / "model"), [text], window=WINDOW)
    ids = torch.tensor(list(text.read_bytes()))
    assert trace.tokens.tolist() == ids.tolist()
    assert trace.positions.tolist() == [place % WINDOW for place in range(len(ids))]
    assert trace.facts.model_type == model_type
    assert trace.facts.weights_on == ("input" if model_type == "llama4_text" else "output")
    dense = {"qwen2_moe": {1}, "deepseek_v3": {0}, "glm4_moe": {0}}.get(model_type, set())
    assert set(trace.facts.layers) == {0, 1, 2} - dense
    assert_recorded(model_type, model, trace.experts, trace.weights, ids)


def test_the_trained_model_through_the_command(recorded: Recorded) -> None:
    from transformers import AutoModelForCausalLM

    trace = recorded.trace
    assert trace.facts.domains == ("english.md", "python.py")
    assert np.bincount(trace.domains).tolist() == [3000, 3000]
    assert trace.tokens[3000:].tolist() == list(recorded.texts[1].read_bytes()[:3000])
    assert "none in the checkpoint" in trace.facts.tokenizer
    assert trace.texts[ord("a")] == "a"
    model = AutoModelForCausalLM.from_pretrained(recorded.model).eval()
    # The recorder's windows begin anew at each text, 100 tokens each; a run of halves would see other states.
    part = torch.from_numpy(trace.tokens[3000:3050].astype(np.int64))
    first = [(router, x) for router, x in router_inputs(model, part)]
    for (router, x), ids, weights in zip(first, trace.experts, trace.weights, strict=True):
        for token, wanted in enumerate(picks_of("olmoe", router, x, model.config)):
            found = dict(zip(ids[3000 + token].tolist(), weights[3000 + token].tolist(), strict=True))
            assert found == pytest.approx(dict(wanted), rel=1e-4, abs=1e-6)


def test_training_made_domains_differ(recorded: Recorded) -> None:
    """Else the tests of the report would look at noise: 3,000 tokens move a share by about 1 %."""
    trace = recorded.trace
    apart = []
    for ids in trace.experts:
        one, other = (np.bincount(ids[trace.domains == d].ravel(), minlength=8) / 6000 for d in (0, 1))
        apart.append(np.abs(one - other).sum() / 2)
    assert max(apart) > 0.03


def test_a_tokenizer_of_the_checkpoint_is_used(tmp_path: Path, text: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = save(tiny("mixtral"), tmp_path / "model")
    words = {"<unk>": 0, "A": 1, "fox": 2, "grapes": 3, ".": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    trace = record(folder, [text], tokens=6)
    assert trace.tokens.tolist() == [1, 2, 0, 0, 3, 4]
    assert trace.texts == {0: "<unk>", 1: "A", 2: "fox", 3: "grapes", 4: "."}
    assert "the checkpoint's own" in trace.facts.tokenizer


def test_layers_and_half(tmp_path: Path, text: Path) -> None:
    folder = save(tiny("mixtral"), tmp_path / "model")
    whole = record(folder, [text], window=WINDOW)
    part = record(folder, [text], window=WINDOW, layers=[0, 2], half=True)
    assert part.facts.layers == (0, 2)
    assert (part.experts == whole.experts[[0, 2]]).all()
    assert part.weights.dtype == np.float16
    assert part.weights == pytest.approx(whole.weights[[0, 2]], rel=1e-3)
    with pytest.raises(ValueError, match=r"layer 7 is no MoE layer of this model \(allowed: 0, 1, 2\)"):
        record(folder, [text], layers=[1, 7])


def test_a_checkpoint_without_a_head_is_the_same_model(tmp_path: Path, text: Path) -> None:
    model = tiny("mixtral")
    whole = record(save(model, tmp_path / "whole"), [text])
    body = record(save(model.base_model, tmp_path / "body"), [text])
    assert (body.experts == whole.experts).all()
    assert (body.weights == whole.weights).all()


def test_nothing_of_the_process_is_changed(tmp_path: Path, text: Path) -> None:
    from huggingface_hub import constants
    from transformers.utils import logging

    before = constants.HF_HUB_OFFLINE, logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(ValueError, match="not a folder"):
        record(tmp_path / "none", [text])
    assert (constants.HF_HUB_OFFLINE, logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# What cannot be recorded


def said(*words: str) -> str:
    """The one line of a command that fails with exit code 2."""
    done = traced(*words)
    assert done.exit_code == 2, (done.output, done.exception)
    lines = [line for line in done.stderr.splitlines() if line.startswith("moebench: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def tampered(folder: Path, change: str) -> Path:
    """The checkpoint with one thing wrong about its weights."""
    for path in sorted(folder.glob("*.safetensors")):
        weights = load_file(path)
        name = next(
            (n for n in weights if n.endswith(("layers.1.mlp.gate.weight", "1.block_sparse_moe.gate.weight"))), ""
        )
        if name and change == "nan":
            weights[name][0, 0] = torch.nan
        elif name:
            del weights[name]
        save_file(weights, path, metadata={"format": "pt"})
    return folder


def test_weights_that_are_not_finite(tmp_path: Path, text: Path) -> None:
    folder = tampered(save(tiny("mixtral"), tmp_path / "model"), "nan")
    assert "layer 1: its router gave weights that are not finite" in said(str(folder), "--text", str(text))


def test_a_checkpoint_that_lacks_weights_is_not_filled_with_random_ones(tmp_path: Path, text: Path) -> None:
    folder = tampered(save(tiny("mixtral"), tmp_path / "model"), "missing")
    line = said(str(folder), "--text", str(text))
    assert "its files lack weights" in line
    assert "gate.weight" in line


def test_a_dense_model_is_named(tmp_path: Path, text: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    folder = save(LlamaForCausalLM(config), tmp_path / "model")
    assert "the family llama cannot be traced: no layer of it calls experts" in said(str(folder), "--text", str(text))


@pytest.mark.parametrize("model_type", ["switch_transformers", "nllb-moe", "zaya"])
def test_families_that_are_refused_by_name(model_type: str, tmp_path: Path, text: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert f"the family {model_type} cannot be traced: its " in said(str(tmp_path), "--text", str(text))


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (None, "has no config.json"),
        ("{", "cannot be loaded"),
        ("[]", "cannot be loaded"),
        ('{"model_type": "no_such_moe"}', "no_such_moe"),
        ('{"model_type": "mixtral", "hidden_size": -3}', "cannot be loaded"),
        ('{"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}', "cannot be loaded"),
    ],
)
def test_folders_that_are_no_checkpoint(config: str | None, line: str, tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
    if config is not None:
        (folder / "config.json").write_text(config)
    assert line in said(str(folder), "--text", str(text))


def test_pickled_weights_are_not_read(tmp_path: Path, text: Path) -> None:
    model = tiny("mixtral")
    folder = save(model, tmp_path / "model")
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert "has no *.safetensors" in said(str(folder), "--text", str(text))


def test_wrong_words(tmp_path: Path, text: Path, recorded: Recorded) -> None:
    model = str(recorded.model)
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / text.name).write_text("two")
    assert "no such file" in said(model, "--text", "none.txt")
    assert "has no tokens" in said(model, "--text", str(empty))
    assert "not UTF-8" in said(model, "--text", str(binary))
    assert "two files are called 'fable.txt'" in said(model, "--text", str(text), "--text", str(twin / text.name))
    assert "--layers '3-1'" in said(model, "--text", str(text), "--layers", "3-1")
    assert ".safetensors file" in said(model, "--text", str(text), "--out", "trace.npz")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_no_gpu(text: Path, recorded: Recorded) -> None:
    with pytest.raises(RunError, match="--device cuda: there is no CUDA GPU here"):
        record(recorded.model, [text], device="cuda")


def test_rows_of_json(tmp_path: Path, text: Path, recorded: Recorded) -> None:
    out = tmp_path / "deep" / "t.safetensors"
    done = traced(str(recorded.model), "--text", str(text), "--layers", "1-2", "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["layer"] for row in rows] == [1, 2]
    counts = np.bincount(read_trace(out).experts[0].ravel(), minlength=8)
    assert rows[0]["max_over_mean"] == pytest.approx(counts.max() / counts.mean())
