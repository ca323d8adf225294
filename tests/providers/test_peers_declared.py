"""What every adapter declares: where its library comes from, what it refuses, and what its fingerprint follows."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
from peer_arms import LAYER, case, stand_in, verdict_of

from moebench.point import STAGES, Capacity
from moebench.providers import PROVIDERS, Listing, liger, peers
from moebench.providers.load import Unavailable, load
from moebench.providers.packages import Package, missing
from moebench.worker import status_of

PEERS = [name for name, listing in PROVIDERS.items() if listing.needs is not None]
NAMES = ["transformers-eager", "transformers-batched-mm", "transformers-grouped-mm", "liger", "moe-ops", "scattermoe",
         "triton-kernels", "sonic-moe", "deepgemm", "fbgemm", "torchao", "vllm", "sglang", "flashinfer",
         "transformer-engine", "megablocks"]  # fmt: skip
ABSENT = Package("no_such_library", ("no-such-library",), "1.2")


def adapter(name: str) -> Any:
    """The provider, whether or not its library is there."""
    module, _, attribute = PROVIDERS[name].target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def test_all_are_listed() -> None:
    assert PEERS == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_refuses_what_it_does_not_take(name: str) -> None:
    provider = adapter(name)
    assert provider.name == name
    assert PROVIDERS[name].role == "arm"
    takes = {"precision": provider.precisions[0]}
    assert provider.refuse(case(**takes)) is None
    assert "has no stage" in provider.refuse(case(scope=STAGES[0], **takes))
    if "cpu" not in provider.devices:
        assert provider.refuse(case(device_kind="cpu", **takes)) == f"{name} takes devices cuda, not cpu"
    if provider.directions == ("forward",):
        wrong = provider.refuse(case(direction="forward_backward", **takes))
        assert wrong == f"{name} takes directions forward, not forward_backward"
    if not provider.accepts_drops:
        assert provider.refuse(case(capacity=Capacity(1.0), **takes)) == f"{name} takes no dropped assignments"
    if "fp32" not in provider.precisions:
        assert "not fp32" in provider.refuse(case(precision="fp32"))
    if provider.multiple_of > 1:
        odd = case(layer=replace(LAYER, expert_ffn_size=LAYER.expert_ffn_size + 1), **takes)
        assert f"a multiple of {provider.multiple_of}, which 129 is not" in provider.refuse(odd)
    if "relu2" not in provider.activations:
        unbuilt = case(layer=replace(LAYER, activation="relu2"), **takes)
        assert provider.refuse(unbuilt) == f"{name} does not compute activation 'relu2'"
    biased = case(layer=replace(LAYER, expert_bias=True), **takes)
    assert provider.refuse(biased) == f"{name} does not take biases in the experts"


def test_a_library_that_is_not_installed_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "absent", Listing("moebench.providers.liger:PROVIDER", "", needs=ABSENT))
    monkeypatch.setattr("moebench.providers.packages._has_gpu", lambda: True)
    with pytest.raises(Unavailable) as error:
        load("absent")
    assert str(error.value) == "absent: no_such_library is not installed (pip install 'no-such-library==1.2')"


def test_so_is_one_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Package("json", ("json",), "1")
    monkeypatch.setattr("moebench.providers.packages._has_gpu", lambda: False)
    assert missing(there) == "it needs a CUDA GPU, and PyTorch finds none here"
    assert missing(replace(there, gpu=False)) is None
    both = str(missing(ABSENT))
    assert both.startswith("no_such_library is not installed (")
    assert both.endswith("; it needs a CUDA GPU, and PyTorch finds none here")
    monkeypatch.setattr("moebench.providers.packages._has_gpu", lambda: True)
    assert missing(there) is None


def test_so_is_one_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found when it is first used: listing the providers imports none of them."""
    stand_in(monkeypatch, {"liger_kernel.ops": {}})
    with pytest.raises(
        Unavailable, match=r"importing liger_kernel.ops failed: AttributeError: .*LigerFusedMoEFunction"
    ):
        verdict_of(replace(liger.PROVIDER, devices=("cpu",), precisions=("fp32",)))
    with pytest.raises(Unavailable, match=r"importing no_such_library.sub failed: ModuleNotFoundError"):
        peers.peer("no_such_library.sub", "f")
    assert status_of(Unavailable("")) == "unavailable"


def test_a_fingerprint_follows_the_library_s_version(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"liger-kernel": "0.8.5"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    first = peers.peer_provider("liger", liger.ready)
    assert first.version == "liger-kernel 0.8.5"
    assert first.fingerprint() == peers.peer_provider("liger", liger.ready).fingerprint()
    versions["liger-kernel"] = "0.8.6"
    assert peers.peer_provider("liger", liger.ready).fingerprint() != first.fingerprint()
    versions.clear()
    assert peers.peer_provider("liger", liger.ready).version.startswith("liger_kernel ")


def test_listing_shows_all_quickly_and_imports_none() -> None:
    code = (
        "import json, sys\n"
        "from moebench import probe\n"
        "print(json.dumps([probe._provider(name, 'cpu') for name in json.loads(sys.argv[1])]))\n"
        "print(json.dumps(sorted(set(json.loads(sys.argv[2])) & set(sys.modules))))"
    )
    modules = sorted({listing.needs.module for listing in PROVIDERS.values() if listing.needs is not None})
    begin = time.process_time()
    done = subprocess.run([sys.executable, "-c", code, json.dumps(NAMES), json.dumps(modules)], capture_output=True,
                          text=True, check=True)  # fmt: skip
    found, imported = map(json.loads, done.stdout.splitlines())
    assert time.process_time() - begin < 5  # our own share; the child's is its import of torch
    assert imported == []
    assert len(found) == len(NAMES)
    for row in found:
        assert row["state"] in ("ready", "unavailable")
        assert (row["reason"] is None) == (row["state"] == "ready")


def test_a_padded_plan_starts_each_expert_at_a_block() -> None:
    import torch

    ids = torch.tensor([[0, 3], [3, 1], [3, 0], [5, 3]])
    padded = peers.padded_plan(ids, 6, 4)
    assert padded.ends.tolist() == [4, 8, 8, 12, 12, 16]
    assert padded.row2padded.tolist() == [0, 1, 4, 8, 9, 10, 11, 12]
    assert padded.rows >= 16
    assert padded.rows % 4 == 0
    rows = torch.arange(8.0).unsqueeze(1) + 1
    assert torch.equal(padded.unpad(padded.pad(rows)), rows)
    assert padded.pad(rows).sum() == rows.sum()
    assert peers.padded_rows(torch.tensor([2, 1, 0, 4, 0, 1]), 4) == 16


def test_layouts() -> None:
    import torch

    w = torch.tensor([[[1.0], [2.0], [10.0], [20.0]]])  # gates 1, 2; ups 10, 20
    assert peers.interleave(w).flatten().tolist() == [1, 10, 2, 20]
    assert peers.up_first(w).flatten().tolist() == [10, 20, 1, 2]
