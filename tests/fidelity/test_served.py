"""The three models on another base, measured side by side: what an adapter brings whole takes part exactly."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from mapconv.errors import DataError
from mapconv.fidelity.served import measure_served
from mapconv.placement.adapters import place_adapter
from tests.models import VOCABULARY, kl, load_adapted, load_base, save_adapter, save_tokenizer, tiny_config

ROWS = [[1, 7, 20, 33, 9, 41, 3, 12]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base in bfloat16 whose head is its embedding: neither is held in float32 as a whole."""
    folder = tmp_path_factory.mktemp("served") / "base"
    torch.manual_seed(0)
    config = tiny_config()
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("whole", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [7, 9, 20]}])
def test_heads_and_token_rows_beside_a_base_of_16_bits(base, tmp_path, whole):
    torch.manual_seed(1)
    model = get_peft_model(load_base(base), LoraConfig(r=2, target_modules=["q_proj"], **whole))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # in float32: bfloat16 does not hold these values
                parameter.add_(0.1 * torch.randn_like(parameter))
    source = tmp_path / "source"
    model.save_pretrained(source)
    placed = place_adapter(source, base)
    found = measure_served(placed, placed, source, ROWS, device=torch.device("cpu"))
    assert found is not None
    tokens = torch.tensor(ROWS)
    wanted = load_adapted(base, source)(tokens).logits[:, :-1].double().log_softmax(-1)
    alone = load_base(base)(tokens).logits[:, :-1].double().log_softmax(-1)
    # The divergence of two float32 runs of one function is the square of their logits' rounding.
    assert found.rebased.kl == pytest.approx(0, abs=1e-9)
    assert found.as_is.kl == pytest.approx(0, abs=1e-9)
    assert found.alone.kl == pytest.approx(kl(wanted, alone), rel=1e-4)


def test_a_tokenizer_of_another_model(base, tmp_path):
    placed = place_adapter(save_adapter(base, tmp_path / "lora"), base)
    with pytest.raises(DataError, match=f"a token {VOCABULARY}, and the model has embeddings of {VOCABULARY} only"):
        measure_served(placed, placed, tmp_path / "lora", [[1, VOCABULARY]], device=torch.device("cpu"))
