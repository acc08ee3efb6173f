"""The order of the data and the learning rate are functions of the step alone, which is what resuming rests on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapconv.data import read_rows
from mapconv.placement.adapters import place_adapter
from mapconv.training.data import read_training_data
from mapconv.training.loop import Recipe
from tests import examples

RECIPE = Recipe("distill", "scalars", 40, 1e-3, 4, 32, 0)


@settings(max_examples=examples(20))
@given(sequences=st.integers(1, 30), batch_size=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_pass_reads_each_sequence_once(sequences, batch_size, seed):
    recipe = replace(RECIPE, batch_size=batch_size, seed=seed)
    steps = [recipe.batch(step, sequences) for step in range(3 * sequences)]
    assert all(len(batch) == batch_size for batch in steps)
    stream = [index for batch in steps for index in batch]
    for start in range(0, len(stream) - sequences + 1, sequences):
        assert Counter(stream[start : start + sequences]) == Counter(range(sequences))


def test_passes_and_seeds_differ_in_order():
    first, second = (RECIPE.batch(step, 40) for step in (0, 10))
    assert first != second
    assert first != replace(RECIPE, seed=1).batch(0, 40)


def test_the_rate_warms_up_and_falls():
    rates = [RECIPE.rate(step) for step in range(40)]
    assert rates[0] == pytest.approx(1e-3 / 4, rel=1e-3)
    assert max(rates) == pytest.approx(1e-3, rel=0.02)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert 0 < rates[-1] < 1e-5


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (4, 1), (25, 5), (250, 50), (5000, 50)])
def test_held_out_data_is_measured_five_times_or_more(steps, every):
    assert replace(RECIPE, steps=steps).evaluate_every == every


def test_a_short_distillation_holds_out_few_sequences(closed_form, source, text):
    """Each is run 16 times, so that 32 of them would take longer than 25 steps."""
    rows, placed = read_rows(text), place_adapter(source, None)

    def held_out(**settings) -> int:
        return len(read_training_data(rows, closed_form, placed, length=8, **settings).held_out)

    assert [held_out(trained=trained) for trained in (4, 100, 480, 100_000)] == [3, 3, 10, 32]
    assert held_out(trained=100, objective="task") == held_out() == 32
    assert held_out(trained=100, held_out=20) == 20
