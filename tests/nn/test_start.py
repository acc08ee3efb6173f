"""Where training from scratch starts, and the floor under ‖BA‖ that a start at B = 0 needs, against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from mapconv.nn import MapConfig, get_map_model, map_layers, save_adapter
from mapconv.nn.config import EPS, RELATIVE_BETA
from mapconv.nn.functions import UpdateGain
from mapconv.nn.layers import LAYERS
from mapconv.nn.updates import Update
from tests.models import load_adapted, load_base, log_probabilities
from tests.nn.test_running import close
from tests.nn.test_training import train

N, M = 24, 32


def published(x, W0, A, B, alpha, beta, eps):
    """x·W'ᵀ with W' = α·W0/max(‖W0‖, ε) + β·BA/max(‖BA‖, ε), written out; every norm is differentiated through."""
    update = B @ A
    weight = alpha * W0 / W0.norm().clamp_min(eps) + beta * update / update.norm().clamp_min(eps)
    return x @ weight.T


def relative_error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def live(base, update):
    """A layer that runs with one update, all of which trains."""
    for parameter in update.parameters():
        parameter.requires_grad_(True)
    layer = LAYERS["linear"](base, "layer")
    layer.updates["default"], layer.active = update, "default"
    return layer


@pytest.mark.parametrize("rank", [1, 5, 24])
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_forward_and_gradients_are_those_of_the_formula(rank, size, eps):
    torch.manual_seed(rank)
    base = nn.Linear(M, N, bias=False).requires_grad_(False)
    A, B, x, seen = torch.randn(rank, M), size * torch.randn(N, rank), torch.randn(40, M), torch.randn(40, N)
    norm = float(base.weight.double().norm())
    update = Update(A, B, relative_alpha=1.1, relative_beta=0.7, base_norm=norm, floor=eps)
    y = live(base, update)(x)
    y.backward(seen)
    wide = [tensor.detach().double().requires_grad_() for tensor in (A, B)]
    scalars = [torch.tensor(float(p.detach()) * norm).double().requires_grad_() for p in update.scalars]
    wanted = published(x.double(), base.weight.double(), *wide, *scalars, eps)
    wanted.backward(seen.double())
    assert relative_error(y.detach(), wanted.detach()) < 1e-6
    for parameter, other in zip((update.A, update.B), wide, strict=True):
        assert relative_error(parameter.grad, other.grad) < 1e-6
    for parameter, other in zip(update.scalars, scalars, strict=True):
        assert float(parameter.grad) == pytest.approx(float(other.grad) * norm, rel=1e-5, abs=1e-5)


def test_absolute_scalars_are_the_numbers_of_the_formula(base, tmp_path):
    """Their values, their gradients, what a step of Adam's moves them by, and what is saved."""
    model = get_map_model(load_base(base), MapConfig(rank=4, units="absolute", targets=("q_proj",), eps=1e-6))
    layer = next(iter(map_layers(model).values()))
    update, weight = layer.update("default"), layer.base_layer.weight.detach()
    norm = float(weight.double().norm())
    assert [name for name, _ in update.named_parameters()] == ["A", "B", "absolute_alpha", "absolute_beta"]
    assert [float(scalar.detach()) for scalar in update.scalars] == pytest.approx([norm, 1.0])
    assert layer.gains("default")[0] == pytest.approx(1.0, abs=1e-7)
    with torch.no_grad():
        update.B.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
    layer(x).square().sum().backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (update.A, update.B, *update.scalars)]
    published(x.double(), weight.double(), *wide, 1e-6).square().sum().backward()
    for parameter, other in zip((update.A, update.B, *update.scalars), wide, strict=True):
        assert relative_error(parameter.grad, other.grad) < 1e-6
    torch.optim.Adam(update.scalars, lr=0.25).step()
    assert layer.alpha("default") == pytest.approx(norm - 0.25, rel=1e-6)
    assert abs(layer.beta("default") - 1.0) == pytest.approx(0.25, rel=1e-6)
    assert update.sizes(layer.base_layer, "") == pytest.approx([layer.beta("default") / norm], rel=1e-6)
    ran = log_probabilities(model)
    save_adapter(model, tmp_path / "map")
    assert close(log_probabilities(load_adapted(base, tmp_path / "map")), ran)


@pytest.mark.parametrize("floor", [0.5, 50.0])
def test_gradients_on_both_sides_of_the_floor(floor):
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((1,), (3, 6), (5, 3))]
    assert gradcheck(lambda *t: UpdateGain.apply(*t, 1.7, torch.float64, floor), inputs)


def test_a_norm_whose_columns_cancel_is_still_exact():
    torch.manual_seed(0)
    column, row = torch.randn(N, 1), torch.randn(1, M)
    A, B = torch.cat([row, row * (1 + 1e-3)]), torch.cat([column, -column], 1)
    gain = UpdateGain.apply(torch.ones(1), A, B, 1.0, torch.float32, 0.0)
    assert float(gain) == pytest.approx(1 / float((B.double() @ A.double()).norm()), rel=1e-6)


def test_a_small_update_stays_in_the_range_of_float16():
    torch.manual_seed(0)
    base = nn.Linear(M, N, bias=False).requires_grad_(False)
    update = Update(torch.randn(4, M), 1e-5 * torch.randn(N, 4), relative_alpha=1.0, relative_beta=0.1, base_norm=3.0)
    layer = live(base, update)
    with torch.autocast("cpu", torch.float16):
        y = layer(torch.randn(8, M))
    # What a loss scale of 65536 makes of a gradient of 1e-3.
    y.backward(torch.full_like(y, 60.0))
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in update.parameters())


@pytest.mark.parametrize(
    ("settings", "beta", "zero"),
    [
        ({}, lambda norm: 1.0, True),
        ({"beta": 0.3}, lambda norm: 0.3, True),
        ({"beta": "relative"}, lambda norm: RELATIVE_BETA * norm, True),
        ({"init": "random"}, lambda norm: 0.0, False),
    ],
    ids=["paper", "number", "relative", "random"],
)
def test_each_start_is_the_base_and_learns(base, settings, beta, zero):
    model = load_base(base)
    plain = log_probabilities(model)
    get_map_model(model, MapConfig(rank=4, **settings))
    assert close(log_probabilities(model), plain, atol=1e-6)
    for layer in map_layers(model).values():
        update = layer.update("default")
        assert layer.beta("default") == pytest.approx(beta(update.base_norm), rel=1e-6)
        assert bool((update.B == 0).all()) == zero
    losses = train(model, steps=8)
    assert losses[-1] < losses[0] - 0.1


def test_frozen_scalars_stay(base):
    model = get_map_model(load_base(base), MapConfig(rank=4, frozen=("alpha",)))
    train(model, steps=3)
    layers = list(map_layers(model).values())
    assert all(float(layer.update("default").relative_alpha.detach()) == 1.0 for layer in layers)
    assert any(layer.beta("default") != pytest.approx(1.0, rel=1e-6) for layer in layers)


def test_below_the_floor_what_is_saved_is_the_plain_lora_that_ran(base, tmp_path):
    model = get_map_model(load_base(base), MapConfig(rank=4, eps=EPS))
    with torch.no_grad():
        for number, layer in enumerate(map_layers(model).values()):
            update = layer.update("default")
            # Half of them below the floor, half above.
            size = EPS * (0.5 if number % 2 else 5) / float((torch.ones_like(update.B) @ update.A).norm())
            update.B.fill_(size)
    ran = log_probabilities(model)
    save_adapter(model, tmp_path / "map")
    assert close(log_probabilities(load_adapted(base, tmp_path / "map")), ran)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"init": "zero"}, "init"),
        ({"beta": "big"}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"eps": -1}, "eps"),
        ({"eps": 0}, "random"),
        ({"beta": 0}, "random"),
        ({"frozen": ["A"]}, "frozen"),
        ({"frozen": "alpha"}, "frozen"),
        ({"direction": "dora", "beta": 1.0}, "low-rank direction"),
        ({"units": "norms"}, "expected one of relative, absolute"),
        ({"direction": "dora", "units": "absolute"}, "low-rank direction"),
    ],
)
def test_a_start_without_meaning_is_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        MapConfig(**settings)
