"""``verify`` on models of every kind: it must find an exact result exact, and a changed one changed."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from tests.models import save_tokenizer

from .models import MODELS
from .options import OPTIONS
from .oracle import Case, Workshop
from .tiny import VOCAB

#: float32 weights and forward passes of two layers: a few hundred roundings of 2⁻²⁴, relative to updates that are
#: about as large as the weights.
ROUNDING = 1e-4
CASES = [
    ("lora", "llama"),
    ("dora", "gpt2"),
    ("save-classifier", "gpt2-classifier"),
    ("save-classifier", "distilbert-classifier"),
    ("dora", "bert"),
    ("lora", "t5"),
    ("embedding-lora", "llama"),
    ("conv-dora", "vit"),
    ("experts-two", "qwen3-moe"),
    ("experts-two", "gpt-oss"),
    ("replication", "llama"),
    ("resized", "llama"),
    ("lora", "qwen2-vl"),
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def verified(request, workshop: Workshop, tmp_path):
    """(case, a base folder with a tokenizer, a place for results)."""
    option = next(option for option in OPTIONS if option.name == request.param[0])
    case = workshop.case(MODELS[request.param[1]], option)
    base = shutil.copytree(case.base, tmp_path / "base")
    save_tokenizer(base, VOCAB)
    return case, base, tmp_path


def check(report, case: Case) -> None:
    assert max(module.error for module in report.modules) < ROUNDING
    if report.kl is None:
        assert report.notes
        assert case.tiny.name == "vit"
        return
    assert report.kl < ROUNDING**2 < report.kl_base
    assert report.top1_agreement > 0.99


def test_a_merged_model(verified):
    case, base, folder = verified
    mapconv.merge(case.adapter, folder / "merged", base=base)
    check(mapconv.verify(folder / "merged", case.adapter, base=base, samples=1), case)


def test_a_map_directory(verified):
    case, base, folder = verified
    mapconv.upgrade(case.adapter, folder / "map", base=base, direction="dora" if case.uses_dora else "low-rank")
    check(mapconv.verify(folder / "map", case.adapter, base=base, samples=1), case)


def test_a_changed_weight_is_found(workshop: Workshop, tmp_path):
    case = workshop.case(MODELS["distilbert-classifier"], next(o for o in OPTIONS if o.name == "save-classifier"))
    base = shutil.copytree(case.base, tmp_path / "base")
    save_tokenizer(base, VOCAB)
    mapconv.merge(case.adapter, tmp_path / "merged", base=base)
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_lin.weight"))
    tensors[name] = tensors[name] + 0.1 * torch.randn_like(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    report = mapconv.verify(tmp_path / "merged", case.adapter, base=base, samples=1)
    assert report.worst_module.path == name.removesuffix(".weight")
    assert report.worst_module.error > 0.01
    assert report.kl > 0
