"""Divergences of models that are far apart, and of those that all but agree."""

from __future__ import annotations

import pytest
import torch

from mapconv.fidelity.metrics import Sums, add_all


@pytest.mark.parametrize("distance", [1.0, 1e-3, 1e-7])
def test_a_divergence_keeps_its_digits_however_small(distance):
    generator = torch.Generator().manual_seed(0)
    source = 3 * torch.randn(40, 500, generator=generator)
    model = source + distance * torch.randn(source.shape, generator=generator)
    totals = [Sums(), Sums()]
    add_all(totals, source, [source, model], None)
    difference = source.double().log_softmax(-1) - model.double().log_softmax(-1)
    # e^−d − 1 + d, whose two parts would cancel below d = 1e-8 as a difference of sums.
    wanted = (source.double().softmax(-1) * (torch.expm1(-difference) + difference)).sum(-1).mean()
    # Rounded to float32, models 1e-7 apart differ by 1e-7 in d, and d²/2 by 1e-15: far below what the sums keep.
    assert totals[1].means(causal=True).kl == pytest.approx(float(wanted), rel=1e-6, abs=0)
    assert totals[0].means(causal=True).kl == 0
