"""Several adapters merged at once: LoRA deltas add, with weights; two DoRAs on one weight are refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

import mapconv

from .bases import load_base
from .models import MODELS
from .options import OPTIONS
from .oracle import Workshop, distance, tolerance

BY_NAME = {option.name: option for option in OPTIONS}


def both_at_once(tiny, first, second, weights) -> torch.Tensor:
    """Logits of PEFT's live model with both adapters active, each scaled by its weight."""
    model = PeftModel.from_pretrained(load_base(tiny, first.base), first.adapter, adapter_name="first")
    model.load_adapter(second.adapter, adapter_name="second")
    model.base_model.set_adapter(["first", "second"])
    for name, weight in zip(("first", "second"), weights, strict=True):
        for module in model.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= weight
    return tiny.logits(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-classifier", "vit", "qwen2-vl", "mixtral"])
@pytest.mark.parametrize("weights", [None, (0.7, -0.4)], ids=["plain", "weighted"])
def test_deltas_of_two_adapters_add(name, weights, workshop: Workshop, tmp_path):
    tiny = MODELS[name]
    # One adapts both layers with one scaling, the other has ranks and scalings of its own.
    first, second = (workshop.case(tiny, BY_NAME[option]) for option in ("lora", "rslora-patterns"))
    expected = both_at_once(tiny, first, second, weights or (1.0, 1.0))
    limit = tolerance(first) + tolerance(second)
    assert distance(expected, first.trained) > 1000 * limit
    assert distance(expected, second.trained) > 1000 * limit
    given = {} if weights is None else {"weights": list(weights)}
    mapconv.merge([first.adapter, second.adapter], tmp_path / "out", base=first.base, dtype="float32", **given)
    assert distance(tiny.logits(tiny.load(tmp_path / "out")), expected) <= limit


def test_adapters_of_different_layers_add(workshop: Workshop, tmp_path):
    tiny = MODELS["whisper"]
    first = workshop.case(tiny, BY_NAME["lora"])
    second = workshop.case(tiny, BY_NAME["head-lora"])
    expected = both_at_once(tiny, first, second, (1.0, 1.0))
    mapconv.merge([first.adapter, second.adapter], tmp_path / "out", base=first.base, dtype="float32")
    got = tiny.logits(tiny.load(tmp_path / "out"))
    assert distance(got, expected) <= tolerance(first) + tolerance(second)


@pytest.mark.parametrize("partner", ["dora", "lora"])
def test_a_dora_shares_its_weights_with_no_other_adapter(partner, workshop: Workshop, tmp_path):
    tiny = MODELS["llama"]
    first = workshop.case(tiny, BY_NAME["patterns-dora"])
    second = workshop.case(tiny, BY_NAME[partner])
    with pytest.raises(mapconv.MapconvError, match="DoRA"):
        mapconv.merge([first.adapter, second.adapter], tmp_path / "out", base=first.base)
    assert not (tmp_path / "out").exists()


def test_as_many_weights_as_adapters(workshop: Workshop, tmp_path):
    case = workshop.case(MODELS["llama"], BY_NAME["lora"])
    with pytest.raises((mapconv.MapconvError, ValueError), match="weights"):
        mapconv.merge([case.adapter, case.adapter], tmp_path / "out", base=case.base, weights=[1.0])
    assert not (tmp_path / "out").exists()


def test_a_weight_does_not_scale_what_comes_whole(workshop, tmp_path):
    option = next(option for option in OPTIONS if option.name == "save-head")
    case = workshop.case(MODELS["llama"], option)
    with pytest.raises(mapconv.MapconvError, match="cannot be scaled"):
        mapconv.merge(case.adapter, tmp_path / "out", base=case.base, weights=[0.5])
    twin = shutil.copytree(case.adapter, tmp_path / "twin")
    with pytest.raises(mapconv.MapconvError, match="both replace"):
        mapconv.merge([case.adapter, twin], tmp_path / "out", base=case.base)
    assert not (tmp_path / "out").exists()
