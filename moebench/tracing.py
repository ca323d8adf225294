"""Recording a trace: a transformers model reads text, and where its routers send each token is kept.

Needs torch and transformers. How the routers are listened to is in `moebench.tracing_hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moebench import __version__
from moebench.catalogue.textfile import read_text
from moebench.failures import RunError
from moebench.trace_file import MAX_TEXT, Facts, Trace, one_line, printable
from moebench.tracing_hooks import Layer, Listener, Untraceable, check_window, keep_only, numbers_of

MAX_TEXT_BYTES = 100_000_000
CHARACTERS_A_TOKEN = 64  # more text than this for each wanted token is not even tokenised
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
NO_TEXT_ALONE = "its decoder needs an encoder's output beside text"
# Families whose experts are called with ids and weights that do not say who went where.
REFUSED = {
    "zaya": "its tokens may skip all experts, which looks like expert 0 with weight 0",
    "switch_transformers": NO_TEXT_ALONE,
    "nllb-moe": NO_TEXT_ALONE,
}


def record(
    folder: Path,
    texts: Sequence[Path],
    *,
    tokens: int = 4096,
    window: int = 1024,
    layers: Sequence[int] | None = None,
    device: str = "cpu",
    half: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Run the checkpoint in `folder` over texts and record every MoE layer.

    Args:
        texts: UTF-8 files; each is a domain, named as the file.
        tokens: at most this many of each text.
        window: tokens of one forward pass; fewer where the model has fewer positions.
        layers: the model's numbers of the layers to keep; None for all.
        half: keep weights as float16.
        progress: told (tokens done, tokens to do).

    Raises:
        ValueError: the folder, a text, a layer's number or the family is wrong, or weights are not finite; one line.
        RunError: the device is missing or its memory too small.
    """
    domains = _domain_names(texts)
    with _offline(), torch.inference_mode():
        model = _load(folder, device)
        vocabulary = int(model.get_input_embeddings().num_embeddings)
        reader = Reader(folder, vocabulary)
        ids = [reader.read(path, tokens) for path in texts]
        window = min(window, _positions(model.config) or window)
        found, positions = _run(model, folder, ids, window, layers, progress)
    numbers = numbers_of(found)
    stream = np.concatenate(ids)
    trace_facts = Facts(
        model=printable(folder.resolve().name),
        model_type=printable(str(model.config.model_type)),
        routed_experts=found[0].routed_experts,
        top_k=found[0].top_k,
        layers=tuple(numbers),
        domains=domains,
        tokenizer=reader.note,
        weights_on="input" if found[0].on_input else "output",
        dtype=str(model.dtype).removeprefix("torch."),
        made_by=__version__,
    )
    return Trace(
        trace_facts,
        experts=np.stack([np.concatenate(layer.ids) for layer in found]),
        weights=_weights(found, numbers, half),
        tokens=stream.astype(np.int32),
        positions=positions,
        domains=np.repeat(np.arange(len(ids), dtype=np.uint16), [len(each) for each in ids]),
        texts=reader.texts(np.unique(stream)),
    )


def _weights(found: Sequence[Layer], numbers: Sequence[int], half: bool) -> NDArray[Any]:
    weights = np.stack([np.concatenate(layer.weights) for layer in found])
    kept = weights.astype(np.float16) if half else weights
    for layer, before, after in zip(numbers, weights, kept, strict=True):
        if not np.isfinite(before).all():
            raise ValueError(f"layer {layer}: its router gave weights that are not finite; the checkpoint is damaged")
        if not np.isfinite(after).all():
            raise ValueError(f"layer {layer}: weights up to {np.abs(before).max():.3g} do not fit float16")
    return kept


# Loading


def _load(folder: Path, device: str) -> Any:
    """The checkpoint without its head, in eval mode, from this folder and nowhere else."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; a checkpoint is a folder with config.json and safetensors files")
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise ValueError(f"{folder}: has no {pattern}; a checkpoint needs config.json and safetensors files")
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: there is no CUDA GPU here")
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

    local = {"local_files_only": True, "trust_remote_code": False}
    with _one_line_of(f"{folder}: cannot be loaded", device):
        config = AutoConfig.from_pretrained(folder, **local)
    _refuse(config)
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    with _one_line_of(f"{folder}: cannot be loaded", device):
        model, report = auto.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, **local
        )
        body = model.base_model.eval().to(device)  # the head would make logits that nobody reads
    # Weights that the files do not hold would be random, and so would the routing.
    prefix = "" if body is model else f"{model.base_model_prefix}."
    wrong = [*report["missing_keys"], *(str(each[0]) for each in report["mismatched_keys"])]
    if missing := sorted(name for name in wrong if name.startswith(prefix)):
        raise ValueError(f"{folder}: its files lack weights: {', '.join(missing[:3])}{', …' if missing[3:] else ''}")
    return body


@contextmanager
def _one_line_of(what: str, device: object) -> Iterator[None]:
    """Whatever transformers raises on a damaged checkpoint, or on a model that text alone does not run, as one line."""
    try:
        yield
    except Untraceable:
        raise
    except torch.OutOfMemoryError:
        raise RunError(f"{what}: the memory of {device} is too small") from None
    except Exception as error:  # noqa: BLE001 - it can be anything
        raise ValueError(f"{what}: {one_line(error)}") from None


def _refuse(config: Any) -> None:
    reason = REFUSED.get(config.model_type)
    if reason is None and getattr(config, "is_encoder_decoder", False):
        reason = NO_TEXT_ALONE
    if reason is not None:
        raise ValueError(f"the family {config.model_type} cannot be traced: {reason}")


@contextmanager
def _offline() -> Iterator[None]:
    """No library asks the network (a config may name kernels or base models that are elsewhere), or chatters."""
    try:
        from huggingface_hub import constants
        from transformers.utils import logging
    except ImportError as error:
        raise RunError(f"a trace needs transformers: {one_line(error)}") from None
    before, bars, level = constants.HF_HUB_OFFLINE, logging.is_progress_bar_enabled(), logging.get_verbosity()
    constants.HF_HUB_OFFLINE = True
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _positions(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


# Text to tokens


@dataclass
class Reader:
    """Turns texts into token ids with the checkpoint's own tokenizer, or with bytes where it has none."""

    folder: Path
    vocabulary: int
    note: str = ""

    def __post_init__(self) -> None:
        self.tokenizer: Any = None
        if any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            from transformers import AutoTokenizer

            with _one_line_of(f"{self.folder}: its tokenizer cannot be loaded", "this machine"):
                self.tokenizer = AutoTokenizer.from_pretrained(
                    self.folder, local_files_only=True, trust_remote_code=False
                )
            self.note = printable(f"the checkpoint's own, {type(self.tokenizer).__name__}, no special tokens added")
        else:
            self.note = f"none in the checkpoint: bytes of UTF-8 modulo the vocabulary of {self.vocabulary}"

    def read(self, path: Path, most: int) -> NDArray[Any]:
        """Token ids of the first `most` tokens, int64 [T]."""
        text = read_text(path, MAX_TEXT_BYTES)[: most * CHARACTERS_A_TOKEN]
        if self.tokenizer is None:
            ids = np.frombuffer(text.encode()[:most], dtype=np.uint8).astype(np.int64) % self.vocabulary
        else:
            ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"][:most], dtype=np.int64)
        if not len(ids):
            raise ValueError(f"{path}: has no tokens; a text is needed")
        if ids.max() >= self.vocabulary:
            raise ValueError(f"{self.folder}: its tokenizer gives id {ids.max()}, its model knows {self.vocabulary}")
        return ids

    def texts(self, ids: NDArray[Any]) -> dict[int, str]:
        """Text of each token id; none for bytes that share an id."""
        if self.tokenizer is not None:
            return {int(each): str(self.tokenizer.decode([int(each)]))[:MAX_TEXT] for each in ids}
        if self.vocabulary < 256:
            return {}
        return {int(each): chr(each) if each < 128 else f"0x{each:02X}" for each in ids}


def _domain_names(texts: Sequence[Path]) -> tuple[str, ...]:
    names = [printable(path.name) for path in texts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--text: two files are called {name!r}; a domain has the name of its file")
    return tuple(names)


# Running


def _run(
    model: Any,
    folder: Path,
    ids: Sequence[NDArray[Any]],
    window: int,
    layers: Sequence[int] | None,
    progress: Callable[[int, int], None],
) -> tuple[list[Layer], NDArray[Any]]:
    """The layers that spoke, in the model's order, and each token's position in its window."""
    total, positions = sum(map(len, ids)), []
    listener = Listener(model)
    try:
        for stream in ids:
            for start in range(0, len(stream), window):
                part = torch.from_numpy(stream[start : start + window]).to(model.device)[None]
                with _one_line_of(f"{folder}: cannot be run on text alone", model.device):
                    model(input_ids=part, use_cache=False)
                positions.append(np.arange(part.shape[1], dtype=np.int32))
                if len(positions) == 1 and layers is not None:
                    keep_only(listener.layers, layers)
                check_window(listener.layers, len(positions), part.shape[1], model.config.model_type)
                progress(sum(map(len, positions)), total)
    finally:
        listener.close()
    return listener.layers, np.concatenate(positions)
