"""Stock PEFT against itself: every case of the matrix is sound before mapconv is judged by it.

A case is sound if saving and loading gives the same logits, if the adapter matters far more than rounding does, and if
``merge_and_unload`` is right or wrong exactly where the option says so.
"""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from .bases import load_base
from .models import MODELS
from .options import combinations
from .oracle import Workshop, distance, load_adapter, tolerance
from .recipes import TOKENS

CASES = combinations()


def test_the_matrix_is_as_large_as_promised():
    assert len({(tiny.name, option.name) for tiny, option in CASES}) >= 150


@pytest.mark.parametrize(("tiny", "option"), CASES, ids=[f"{option.name}-{tiny.name}" for tiny, option in CASES])
def test_case_is_sound(tiny, option, workshop: Workshop):
    case = workshop.case(tiny, option)
    limit = tolerance(case)
    if case.untrained is not None:
        assert distance(case.trained, case.untrained) > 1000 * limit
    if option.rewrite is not None:
        return  # the oracle is the adapter before the rewrite, which is a case of its own
    model = load_adapter(case, case.adapter)
    # Both sides widen the same float32 numbers, so only the order of float64 sums may differ.
    assert distance(tiny.logits(model), case.live) < 1e-9
    merged = tiny.logits(model.merge_and_unload())
    if option.merge(tiny) == "sound":
        assert distance(merged, case.live) < 1e-9
    else:
        assert distance(merged, case.live) > 100 * limit


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
