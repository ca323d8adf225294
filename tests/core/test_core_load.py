"""From a name to a provider: what a user can get wrong, and what a function may declare."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from core_arms import layer_of, user_kernel, verdict_of

from moebench import providers
from moebench.point import Capacity
from moebench.providers import PROVIDERS, Listing, is_file, is_known, unknown
from moebench.providers.base import ExpertsProvider
from moebench.providers.case import Case
from moebench.providers.load import Unavailable, from_function, load

KERNEL = "def kernel(x, ids, weights, w_gate_up, w_down):\n    return x\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(text)
        return f"{tmp_path / name}:kernel"

    return write


def refused(name: str) -> str:
    with pytest.raises(Unavailable) as error:
        load(name)
    text = str(error.value)
    assert "\n" not in text
    return text


def case(**more: Any) -> Case:
    plain: dict[str, Any] = {
        "layer": layer_of(), "tokens": 8, "direction": "forward", "precision": "fp32", "capacity": Capacity(),
        "scope": "experts", "device_kind": "cpu",
    }  # fmt: skip
    return Case(**plain | more)


def test_a_file_becomes_a_provider(write: Any) -> None:
    name = write(KERNEL)
    found = load(name)
    assert (found.name, found.version, found.plain) == (name, "user", True)
    x = torch.randn(3, 4)
    assert found.experts(x, None, None, None, None) is x
    assert load(user_kernel("right")).version == "1.2"


def test_missing_file() -> None:
    assert refused("nowhere/at_all.py:kernel") == "nowhere/at_all.py:kernel: there is no file 'nowhere/at_all.py'"


def test_missing_function_lists_those_there_are(write: Any) -> None:
    name = write(KERNEL + "def other(): pass\nNUMBER = 3\n").replace(":kernel", ":kernal")
    assert refused(name).endswith("has no 'kernal' (functions in it: kernel, other)")
    assert refused(write("NUMBER = 3\n")).endswith("(functions in it: none)")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def kernel(x:\n", "SyntaxError: "),
        ("import no_such_library\n", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise RuntimeError('two\\nlines')\n", "RuntimeError: two lines"),
        ("raise ValueError\n", "ValueError: no message"),
        ("import sys\nsys.exit('usage: mine.py FILE')\n", "SystemExit: usage: mine.py FILE"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_does_not_import(write: Any, text: str, reason: str) -> None:
    name = write(text)
    assert refused(name).startswith(f"{name}: {reason}")


def test_not_callable(write: Any) -> None:
    assert refused(write("kernel = 3\n")).endswith(":kernel is a int, not a function")


def test_neighbours_of_the_file_import(write: Any) -> None:
    write("from torch.nn.functional import silu\n", name="neighbour_of_mine.py")
    assert load(write("from neighbour_of_mine import silu\n" + KERNEL)).plain


def test_what_is_a_file_name() -> None:
    assert is_file("a/b.py:f")
    assert is_file("C:/x y.py:_f1")
    for other in ("a.py", "a.py:", "a.txt:f", "a.py:1f", "a.py:f g", "torch-loop", ""):
        assert not is_file(other)


def test_an_unknown_name_has_a_nearest_one() -> None:
    assert refused("torch-lop") == unknown("torch-lop")
    assert "did you mean 'torch-loop'?" in unknown("torch-lop")
    assert unknown("zzz").startswith("provider 'zzz' is not known (allowed: a name of `moebench list providers`, or ")
    assert "did you mean" not in unknown("zzz")
    assert not is_known("torch-lop")
    assert all(is_known(name) for name in [*PROVIDERS, "any/file.py:f"])


def test_a_library_that_is_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "peer", Listing("no_such_library.kernels:PROVIDER", "a peer"))
    assert refused("peer") == "peer: ModuleNotFoundError: No module named 'no_such_library'"
    monkeypatch.setitem(PROVIDERS, "peer", Listing("moebench.providers.torch_loop:NOTHING", "a peer"))
    assert refused("peer").startswith("peer: AttributeError: ")


@pytest.mark.parametrize(
    "name", [name for name, listing in PROVIDERS.items() if name != "triton" and listing.needs is None]
)
def test_shipped_providers_load_under_their_names(name: str) -> None:
    assert load(name).name == name


# Entry points.


@pytest.fixture
def offers(monkeypatch: pytest.MonkeyPatch) -> Any:
    def offers(**targets: str) -> None:
        monkeypatch.setattr("moebench.providers.load.entry_points", lambda: targets)
        monkeypatch.setattr(providers, "entry_points", lambda: targets)

    return offers


def test_an_entry_point_that_is_a_function(offers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "offered_kernels.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(tmp_path)
    offers(theirs="offered_kernels:kernel")
    found = load("theirs")
    assert (found.name, found.plain) == ("theirs", True)
    assert is_known("theirs")
    assert "did you mean 'theirs'?" in unknown("their")


def test_an_entry_point_that_is_a_provider(offers: Any) -> None:
    offers(again="moebench.providers.torch_bmm:PROVIDER")
    assert load("again") is load("torch-bmm")


def test_an_entry_point_that_fails(offers: Any) -> None:
    offers(gone="no_such_library:kernel")
    assert refused("gone") == "gone: ModuleNotFoundError: No module named 'no_such_library'"


def test_entry_points_are_those_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    entry = importlib.metadata.EntryPoint("theirs", "lib.mod:f", "moebench.providers")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [entry] if group == "moebench.providers" else []
    )
    assert providers.entry_points() == {"theirs": "lib.mod:f"}


# What a function declares.


def declared(**attributes: Any) -> ExpertsProvider:
    def kernel(x: Any, ids: Any, weights: Any, w_gate_up: Any, w_down: Any) -> Any:
        return x

    for name, value in attributes.items():
        setattr(kernel, name, value)
    return from_function("mine", kernel)


def test_activations_default_to_swiglu() -> None:
    assert declared().refuse(case()) is None
    assert declared().refuse(case(layer=layer_of(activation="relu"))) == "mine does not compute activation 'relu'"
    assert declared(activations=("relu", "gelu")).refuse(case(layer=layer_of(activation="relu"))) is None
    assert declared(activations=("relu",)).refuse(case()) == "mine does not compute activation 'swiglu'"


def test_drops_must_be_accepted() -> None:
    reason = declared().refuse(case(capacity=Capacity(1.0)))
    assert reason == "mine does not accept dropped assignments (set accepts_drops = True on the function)"
    assert declared(accepts_drops=True).refuse(case(capacity=Capacity(1.0))) is None


@pytest.mark.parametrize(
    ("limit", "allowed", "asked"),
    [("precisions", ("bf16", "fp16"), {"precision": "fp32"}), ("devices", ("cuda",), {"device_kind": "cpu"}),
     ("directions", ("forward",), {"direction": "forward_backward"})],
)  # fmt: skip
def test_declared_limits(limit: str, allowed: tuple[str, ...], asked: dict[str, str]) -> None:
    reason = declared(**{limit: allowed}).refuse(case(**asked))
    (value,) = asked.values()
    assert reason == f"the function declares {limit} = {allowed}, and {value!r} is not among them"
    assert declared(**{limit: (*allowed, value)}).refuse(case(**asked)) is None
    assert declared().refuse(case(**asked)) is None


def test_a_stranger_s_padding_is_unknown() -> None:
    assert declared().executed_flops(case(), torch.tensor([1, 2])) is None


def test_a_fingerprint_follows_the_file(write: Any) -> None:
    before = load(write(KERNEL)).fingerprint()
    assert load(write(KERNEL)).fingerprint() == before
    assert load(write(KERNEL + "# changed\n")).fingerprint() != before
    assert load(write(KERNEL + "kernel.version = '2'\n")).fingerprint() != before


class Callable:
    """A kernel with state."""

    def __call__(self, x: Any, ids: Any, weights: Any, w_gate_up: Any, w_down: Any) -> Any:
        return x


@pytest.mark.parametrize(
    "function", [functools.partial(Callable()), Callable(), torch.relu, torch.compile(lambda x: x)]
)
def test_any_callable_has_a_fingerprint(function: Any) -> None:
    assert len(from_function("mine", function).fingerprint()) == 16


def test_a_partial_s_fingerprint_is_its_function_s(write: Any) -> None:
    text = "from functools import partial\ndef f(scale, x, *rest):\n    return x\nkernel = partial(f, 2)\n"
    before = load(write(text)).fingerprint()
    assert load(write(text.replace("return x", "return x + 1"))).fingerprint() != before


def test_a_partial_runs(write: Any) -> None:
    source = Path(user_kernel("right").rpartition(":")[0]).read_text()
    name = write(source + "\nfrom functools import partial\nkernel = partial(right)\n")
    assert verdict_of(name, layer_of(), direction="forward_backward").wrong is None
