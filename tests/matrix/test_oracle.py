"""The matrix itself: its size, and the two places where stock PEFT cannot be the judge of it."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from .bases import load_base
from .models import MODELS
from .options import combinations
from .oracle import Workshop, distance, load_adapter
from .recipes import TOKENS

CASES = combinations()


def test_the_matrix_is_as_large_as_promised():
    assert len({(tiny.name, option.name) for tiny, option in CASES}) >= 150


UNREADABLE = [(tiny, option) for tiny, option in CASES if not option.peft_reads]


@pytest.mark.parametrize(("tiny", "option"), UNREADABLE, ids=[f"{o.name}-{t.name}" for t, o in UNREADABLE])
def test_peft_cannot_read_it(tiny, option, workshop: Workshop):
    """Where the matrix does not ask PEFT for an opinion, PEFT has none: missing keys, or no module matches."""
    case = workshop.case(tiny, option)
    unreadable = (AssertionError, KeyError, ValueError)
    with pytest.raises(
        unreadable, match=r"(missing|unexpected) adapter keys|not found in the base model|lm_head\.weight"
    ):
        load_adapter(case, case.adapter)


def test_peft_forgets_the_bias_of_a_tied_output_layer(workshop: Workshop):
    """Why one case trusts the merge: an adapter that changes nothing already moves the live logits, by the bias."""
    tiny = MODELS["bert"]
    base = workshop.bases.folder("bert", "default")
    bias = load_base(tiny, base).cls.predictions.decoder.bias.detach().double()
    settings = {"target_modules": ["query"], "trainable_token_indices": TOKENS}
    live = tiny.logits(get_peft_model(load_base(tiny, base), LoraConfig(**settings)))
    assert distance(live + bias, tiny.logits(load_base(tiny, base))) < 1e-9
