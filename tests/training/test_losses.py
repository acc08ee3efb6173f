"""The chunked losses against plain autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy as plain_cross_entropy
from torch.nn.functional import kl_div

from mapconv.fidelity.metrics import CHUNK, divergence_terms
from mapconv.training.losses import cross_entropy, divergence

POSITIONS, VOCABULARY = 2 * CHUNK + 5, 11


def draw(*shape, scale=3.0, seed=0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def weights():
    """Of very different sizes, with positions that do not count."""
    return torch.rand(POSITIONS, generator=torch.Generator().manual_seed(9), dtype=torch.float64).sub(0.3).clamp_min(0)


def test_divergence_and_its_gradient(weights):
    source, logits = draw(POSITIONS, VOCABULARY), draw(POSITIONS, VOCABULARY, seed=1).requires_grad_()
    rows = kl_div(logits.log_softmax(-1), source.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    (expected,) = torch.autograd.grad(7 * (rows * weights).sum(), logits)
    loss = divergence(logits, source.clone(), weights)
    (gradient,) = torch.autograd.grad(7 * loss, logits)
    torch.testing.assert_close(loss, (rows * weights).sum(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-15)


def test_cross_entropy_and_its_gradient(weights):
    logits = draw(POSITIONS, VOCABULARY).requires_grad_()
    targets = torch.arange(POSITIONS) % VOCABULARY
    expected_loss = (plain_cross_entropy(logits, targets, reduction="none") * weights).sum()
    (expected,) = torch.autograd.grad(7 * expected_loss, logits)
    loss = cross_entropy(logits, targets, weights)
    (gradient,) = torch.autograd.grad(7 * loss, logits)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_a_small_divergence_keeps_its_digits_in_float32(distance):
    """KL is about distance²/2; the plain sum of first-order terms loses all of it at 1e-4."""
    source = draw(64, 997)
    logits = source + draw(64, 997, scale=distance, seed=1)
    exact = kl_div(logits.log_softmax(-1), source.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    values, _ = divergence_terms(source.float().log_softmax(-1), logits.float().log_softmax(-1))
    # A log-probability in float32 is off by some 1e-6, and each term by twice that, relative to the distance.
    assert float(values.double().mean()) == pytest.approx(float(exact), rel=4e-6 / distance)


@pytest.mark.parametrize("extreme", [-torch.inf, -1e30, 200.0])
def test_extreme_logits_give_finite_numbers(extreme):
    source, logits = draw(3, VOCABULARY, dtype=torch.float32), draw(3, VOCABULARY, seed=1, dtype=torch.float32)
    source[:, 2] = logits[:, 2] = extreme
    source[1, 4], logits[2, 5] = extreme, -1e4
    wide = [values.double().log_softmax(-1) for values in (source, logits)]
    expected = torch.where(wide[0].exp() > 0, wide[0].exp() * (wide[0] - wide[1]), 0.0).sum(-1)
    values, change = divergence_terms(source.log_softmax(-1), logits.log_softmax(-1))
    assert torch.isfinite(change).all()
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_takes_the_place_of_the_sources_logits():
    """Or a third (positions × vocabulary) tensor would exist."""
    source, logits = draw(5, VOCABULARY), draw(5, VOCABULARY, seed=1).requires_grad_()
    expected = (logits.softmax(-1) - source.softmax(-1)).detach()
    divergence(logits, source, torch.ones(5))
    torch.testing.assert_close(source, expected, rtol=1e-11, atol=1e-15)
