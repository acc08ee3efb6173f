"""The base checkpoints of the matrix, in the spellings that are found in the wild.

``default``  what transformers 5 writes: the model's *original* names (per-expert tensors, version 4 prefixes).
``fused``    the names of the live model (transformers 5): stacked experts, ``model.language_model.…``.
``bare``     saved from the model without its head: no ``base_model_prefix``, no head, and two labels in its config.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.copies import Original
from tests.files import read_header

from .models import MODELS
from .tiny import Tiny


class Bases:
    """Writes each base once and hands out its folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.folder = cache(self._write)

    def _write(self, name: str, spelling: str) -> Path:
        model = MODELS[name].build()
        folder = self._root / f"{name}-{spelling}"
        if spelling == "bare":
            model.config.num_labels = 2
            model.base_model.save_pretrained(folder)
        else:
            model.save_pretrained(folder, save_original_format=spelling == "default")
        return folder


def load_base(tiny: Tiny, folder: Path, *, vocab: int | None = None, seed: int | None = None) -> torch.nn.Module:
    """The base as a user of PEFT would load it for an adapter: with the number of labels and of rows that this needs.

    The added rows are random with a ``seed`` (before training) and zero without: the adapter's file must bring them.
    """
    model = copy_of(tiny, folder)
    # torch.manual_seed writes down the stack for each kind of GPU, which takes longer than the copy.
    torch.default_generator.manual_seed(11)
    if vocab is not None:
        old = model.config.vocab_size
        model.resize_token_embeddings(vocab, mean_resizing=False)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows = embedding.weight.data[old:]
            rows.zero_()
            if seed is not None:
                rows.add_(0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def copy_of(tiny: Tiny, folder: Path) -> torch.nn.Module:
    """The model in a folder that nobody writes into any more, which is read once."""
    return _loaded(tiny, folder).copy()


@cache
def _loaded(tiny: Tiny, folder: Path) -> Original:
    labels = {"num_labels": tiny.settings["num_labels"]} if "num_labels" in tiny.settings else {}
    torch.manual_seed(11)  # a head that the base has not got is made anew
    return Original(tiny.load(folder, **labels))


def reloaded(tiny: Tiny, folder: Path, base: Path) -> torch.nn.Module:
    """The model in a folder as transformers loads it, which must find a place for every tensor, and invent none.

    Which tensor goes where depends on the configuration and on the tensors' names and shapes: where these are the
    base's, the folder's values go where those of the base went.
    """
    sources = _sources(tiny, base) if _form(folder) == _base_form(base) else None
    if sources is None:
        model, report = tiny.load(folder, output_loading_info=True)
        assert {name: entries for name, entries in report.items() if entries} == {}
        return model
    model, values = copy_of(tiny, base), load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[sources[name]])
    return model


@cache
def _sources(tiny: Tiny, base: Path) -> dict[str, str] | None:
    """The tensor of the base that each parameter of the loaded model is; None where some are put together of several.

    They are paired by value: every weight of these models is random, hence unlike any other.
    """
    stored, sources = load_file(base / "model.safetensors"), {}
    for name, parameter in copy_of(tiny, base).named_parameters():
        twins = [key for key, value in stored.items() if value.shape == parameter.shape and value.equal(parameter)]
        if len(twins) == 1:
            sources[name] = twins[0]
        else:
            return None
    return sources if sorted(sources.values()) == sorted(stored) else None


def _form(folder: Path) -> tuple[Any, ...]:
    """All that transformers looks at in a model's folder but for the tensors' values."""
    header, _ = read_header(folder / "model.safetensors")
    tensors = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    weights = sorted(path.name for path in folder.iterdir() if "model" in path.name or "adapter" in path.name)
    return json.loads((folder / "config.json").read_text()), tensors, weights


_base_form = cache(_form)
