"""Tiny models in every quantized storage, each with a twin that holds the same values in plain float32."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.checkpoint.codecs.encoders import STORAGES
from tests.models import save_tokenizer, tiny_config

WEIGHTS = "model.safetensors"


def save_plain(folder: Path) -> Path:
    """A Llama in bfloat16 whose sizes suit every storage's groups."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(intermediate_size=64)).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def quantize(plain: Path, storage: str, folder: Path, *, skip: tuple[str, ...] = ("lm_head", "embed")) -> Path:
    """The model with each of its matrices quantized but those whose names have a part of ``skip``."""
    return _store(plain, storage, folder, skip)[0]


def quantize_with_twin(plain: Path, storage: str, folder: Path) -> tuple[Path, Path]:
    """(quantized model, the same values in float32)."""
    return _store(plain, storage, folder, ("lm_head", "embed"))


def _store(plain: Path, storage: str, folder: Path, skip: tuple[str, ...]) -> tuple[Path, Path]:
    how = STORAGES[storage]
    stored, values = {}, {}
    for name, tensor in load_file(plain / WEIGHTS).items():
        if tensor.ndim != 2 or any(part in name for part in skip):
            stored[name], values[name] = tensor, tensor.float()
            continue
        parts, values[name] = how.encode(tensor.float())
        path = name.removesuffix(".weight")
        # Cloned: safetensors refuses tables that several weights share.
        stored |= {f"{path}.{ending}": part.contiguous().clone() for ending, part in parts.items()}
    config = json.loads((plain / "config.json").read_text())
    quantized, twin = folder / storage, folder / f"{storage}-twin"
    for target, tensors, changes in [
        (quantized, stored, {how.key: how.settings}),
        (twin, values, {"dtype": "float32"}),
    ]:
        target.mkdir(parents=True)
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(config | changes))
        save_tokenizer(target)
    return quantized, twin
