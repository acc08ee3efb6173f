"""The base inside a model with adapters: its own outputs, and the adapters afterwards as before."""

from __future__ import annotations

import pytest
import torch

from mapconv.runtime.adapters import without_adapters
from mapconv.runtime.models import attach_with_peft
from tests.models import load_base, prompts, save_adapter


@pytest.mark.parametrize(
    "more", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}], ids=str
)
@torch.no_grad()
def test_it_is_the_base_and_then_the_adapter_again(base, tmp_path, more):
    tokens = prompts()
    first, second = (save_adapter(base, tmp_path / f"{seed}", seed=seed, **more) for seed in (1, 2))
    model = attach_with_peft(attach_with_peft(load_base(base), first, "first"), second, "second")
    alone = load_base(base)(tokens).logits
    for name in ("first", "second"):
        model.set_adapter(name)
        adapted = model(tokens).logits
        assert not torch.equal(adapted, alone)
        with without_adapters(model):
            assert torch.equal(model(tokens).logits, alone)
        assert torch.equal(model(tokens).logits, adapted)
        with model.disable_adapter():  # PEFT's own way
            assert torch.equal(model(tokens).logits, alone)


def test_an_error_inside_leaves_the_adapters_enabled(base, lora):
    model = attach_with_peft(load_base(base), lora, "lora")
    adapted = model(prompts()).logits
    with pytest.raises(ZeroDivisionError), without_adapters(model):
        _ = 1 / 0
    assert torch.equal(model(prompts()).logits, adapted)
