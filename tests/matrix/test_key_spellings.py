"""Random adapters under random spellings of their keys: placement is a bijection, or an error.

No third outcome: nothing placed twice, nothing left out, nothing on a weight of another shape.
"""

from __future__ import annotations

import json
import re
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mapconv
from mapconv.placement.adapters import place_adapter
from tests import examples

from .dialects import CONFIG, WEIGHTS
from .headers import write_header_only
from .models import MODELS
from .oracle import Workshop

RANK = 2
#: Models whose adapters have known spellings of old: (live beginning of a path, the older one).
OLD_NAMES = {
    "llama": (),
    "bert": (),
    "qwen2-vl": (("model.language_model.", "model."), ("model.visual.", "visual.")),
    "llava": (
        ("model.language_model.", "language_model.model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.vision_tower.", "vision_tower."),
    ),
}
PREFIXES = ("base_model.model.", "", "base_model.model.base_model.model.", "module.base_model.model.", "model.")
ADAPTER_NAMES = ("", ".default", ".my_adapter")
NAMES = sorted(OLD_NAMES)


@cache
def linear_shapes(name: str) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of a model, by its live path; heads that may be tied are left out."""
    modules = MODELS[name].build().named_modules()
    linears = {path: tuple(module.weight.shape) for path, module in modules if isinstance(module, torch.nn.Linear)}
    return {path: shape for path, shape in linears.items() if "head" not in path and "decoder" not in path}


@st.composite
def adapters(draw) -> tuple[str, dict[str, tuple[int, ...]], dict[str, str], bool]:
    """(model, tensors of the file, live path of each A by its key, whether every spelling is one that PEFT writes)."""
    name = draw(st.sampled_from(NAMES))
    paths = draw(st.lists(st.sampled_from(sorted(linear_shapes(name))), min_size=1, max_size=6, unique=True))
    old = draw(st.booleans())
    prefix = draw(st.sampled_from(PREFIXES) if draw(st.booleans()) else st.just(PREFIXES[0]))
    suffix = draw(st.sampled_from(ADAPTER_NAMES))
    fault = draw(st.sampled_from(("none", "none", "none", "transposed", "twice", "mixed", "stranger", "half")))
    tensors, owners = {}, {}

    def add(path: str, spelled: str, shape: tuple[int, int], named: str = suffix) -> None:
        key = f"{prefix}{spelled}.lora_A{named}.weight"
        tensors[key] = (RANK, shape[1])
        tensors[f"{prefix}{spelled}.lora_B{named}.weight"] = (shape[0], RANK)
        owners[key] = path

    for path in paths:
        add(path, respelled(name, path) if old else path, linear_shapes(name)[path])
    victim = draw(st.sampled_from(paths))
    if fault == "transposed":
        add(victim, respelled(name, victim) if old else victim, linear_shapes(name)[victim][::-1])
    elif fault == "twice":  # the same module under both of its names
        add(victim, victim if old else respelled(name, victim), linear_shapes(name)[victim])
    elif fault == "mixed":  # another adapter's name on one module
        add(victim, respelled(name, victim) if old else victim, linear_shapes(name)[victim], ".other")
    elif fault == "stranger":
        add("", draw(st.sampled_from(("model.layers.9.self_attn.q_proj", "q_proj", "encoder.dense"))), (16, 16))
    elif fault == "half":
        tensors.pop(next(key for key in tensors if ".lora_B" in key))
    honest = fault == "none" and prefix == PREFIXES[0]
    return name, tensors, owners, honest


def respelled(name: str, path: str) -> str:
    for live, old in OLD_NAMES[name]:
        if path.startswith(live):
            return old + path.removeprefix(live)
    return path


@pytest.fixture(scope="module")
def bases(workshop: Workshop) -> dict[tuple[str, str], Path]:
    return {(name, way): workshop.bases.folder(name, way) for name in NAMES for way in ("default", "fused")}


@given(adapter=adapters(), way=st.sampled_from(("default", "fused")))
@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_placement_is_a_bijection_or_an_error(adapter, way, bases):
    name, tensors, owners, honest = adapter
    with tempfile.TemporaryDirectory() as folder:
        write_header_only(Path(folder) / WEIGHTS, tensors, "F32")
        # A regex that allows every module: the test is about names, not about which of them were left out.
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ".*"}
        (Path(folder) / CONFIG).write_text(json.dumps(config))
        try:
            placed = place_adapter(Path(folder), bases[name, way]).modules
        except mapconv.MapconvError:
            assert not honest, "a spelling that PEFT itself writes was refused"
            return
    used = [ref.name for item in placed for ref in item.module.tensors]
    assert sorted(used) == sorted(tensors), "some tensor of the adapter was placed twice, or never"
    landed = [(piece.tensor.name, piece.index, piece.offset) for item in placed for piece in item.weight.pieces]
    assert len(set(landed)) == len(landed), "two modules share a base weight"
    for item in placed:
        assert item.weight.shape == (item.module.lora_B.shape[0], item.module.lora_A.shape[1])
        owner = owners[item.module.lora_A.name]
        assert owner, "a module that the model has not got was placed"
        assert item.weight.name.endswith(f"{owner.rpartition('.')[2]}.weight")
        assert re.findall(r"\d+", item.weight.name) == re.findall(r"\d+", owner), "another layer's weight"
