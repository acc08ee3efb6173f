"""Stock PEFT against itself: every case of the matrix is sound before mapconv is judged by it.

A case is sound if saving and loading gives the same logits, if the adapter matters far more than rounding does, and if
``merge_and_unload`` is right or wrong exactly where the option says so.
"""

from __future__ import annotations

import pytest

from .options import combinations
from .oracle import Workshop, distance, load_adapter, tolerance

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
        return  # PEFT cannot read most rewritten folders: their oracle is the adapter before the rewrite
    model = load_adapter(case, case.adapter)
    # Both sides widen the same float32 numbers, so only the order of float64 sums may differ.
    assert distance(tiny.logits(model), case.trained) < 1e-9
    verdict = option.merge(tiny)
    merged = tiny.logits(model.merge_and_unload())
    if verdict == "sound":
        assert distance(merged, case.trained) < 1e-9
    else:
        assert distance(merged, case.trained) > 100 * limit
