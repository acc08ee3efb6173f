"""Outputs and gradients of the layers, against formula (1) written out densely in float64 autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mapconv.nn.bases import kind_of, matrix, matrix_shape
from mapconv.nn.dora import DoraUpdate
from mapconv.nn.functions import MapLinear, Scale, UpdateGain, scaled
from mapconv.nn.layers import LAYERS
from mapconv.nn.trained_linear import TrainedLinear
from mapconv.nn.updates import Update

RANK = 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def wide(*shape: int, seed: int) -> torch.Tensor:
    return randn(*shape, seed=seed).requires_grad_()


class TestGradcheck:
    """Every gradient of the custom functions, by finite differences."""

    @pytest.mark.parametrize("bias", [randn(5, seed=3), None], ids=["bias", "plain"])
    def test_linear(self, bias):
        x, weight = wide(2, 4, 6, seed=1), randn(5, 6, seed=2)
        A, B, a, b = wide(RANK, 6, seed=4), wide(5, RANK, seed=5), wide(1, seed=6).squeeze(), wide(1, seed=7).squeeze()
        assert gradcheck(lambda *t: MapLinear.apply(t[0], weight, bias, *t[1:], torch.float64), (x, A, B, a, b))

    @pytest.mark.parametrize("trains", ["x", "A", "B", "a", "b"])
    def test_linear_where_one_input_alone_trains(self, trains):
        inputs = {"x": randn(3, 6, seed=1), "A": randn(RANK, 6, seed=4), "B": randn(5, RANK, seed=5)}
        inputs |= {"a": randn(1, seed=6).squeeze(), "b": randn(1, seed=7).squeeze()}
        weight = randn(5, 6, seed=2)

        def run(value: torch.Tensor) -> torch.Tensor:
            values = inputs | {trains: value}
            return MapLinear.apply(values["x"], weight, None, *(values[n] for n in "ABab"), torch.float64)

        assert gradcheck(run, (inputs[trains].clone().requires_grad_(),))

    @pytest.mark.parametrize("bias", [randn(5, seed=3), None], ids=["bias", "plain"])
    @pytest.mark.parametrize("floor", [0.5, 50.0])
    @pytest.mark.parametrize("trains", ["x", "A", "B", "alpha", "beta", "all"])
    def test_a_linear_layer_whole(self, bias, floor, trains):
        inputs = {"x": randn(2, 3, 6, seed=1), "A": randn(RANK, 6, seed=4), "B": randn(5, RANK, seed=5)}
        inputs |= {"alpha": randn(1, seed=6), "beta": randn(1, seed=7)}
        weight, chosen = randn(5, 6, seed=2), list(inputs) if trains == "all" else [trains]

        def run(*values: torch.Tensor) -> torch.Tensor:
            x, *others = (inputs | dict(zip(chosen, values, strict=True))).values()
            return TrainedLinear.apply(x, weight, bias, *others, 0.8, 1.7, floor, False)

        assert gradcheck(run, [inputs[name].clone().requires_grad_() for name in chosen])

    def test_a_layer_that_no_token_reaches_has_gradients_of_zero(self):
        inputs = [wide(RANK, 6, seed=4), wide(5, RANK, seed=5), wide(1, seed=6), wide(1, seed=7)]
        x = torch.zeros(0, 3, 6, dtype=torch.float64, requires_grad=True)
        y = TrainedLinear.apply(x, randn(5, 6, seed=2), randn(5, seed=3), *inputs, 0.8, 1.7, 0.0, False)
        assert y.shape == (0, 3, 5)
        found = torch.autograd.grad(y.sum(), [x, *inputs])
        assert [part.shape for part in found] == [part.shape for part in (x, *inputs)]
        assert not any(part.any() for part in found)

    def test_gains(self):
        gain, inputs = UpdateGain.apply, (wide(1, seed=3), wide(RANK, 6, seed=1), wide(5, RANK, seed=2))
        assert gradcheck(lambda *t: gain(*t, 1.7, torch.float64, 0.0), inputs)
        assert gradcheck(Scale.apply, (wide(2, 3, 4, seed=1), wide(1, seed=2).squeeze()))

    def test_a_second_derivative_is_refused(self):
        x, gain = wide(2, 3, seed=1), wide(1, seed=2).squeeze()
        (first,) = torch.autograd.grad(Scale.apply(x, gain).square().sum(), gain, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.backward()


def layers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """A layer of each kind in float64 with an input."""
    torch.manual_seed(3)
    found = {
        "linear": (nn.Linear(6, 5), randn(2, 4, 6)),
        "transposed": (Conv1D(5, 6), randn(2, 4, 6)),
        "conv1d": (nn.Conv1d(4, 5, 3, padding=1), randn(2, 4, 7)),
        "conv2d": (nn.Conv2d(4, 5, (3, 2), stride=2, padding=1, padding_mode="reflect"), randn(2, 4, 6, 7)),
        "conv3d": (nn.Conv3d(2, 5, 2, dilation=2), randn(2, 2, 4, 4, 4)),
        "embedding": (nn.Embedding(7, 5), torch.randint(0, 7, (2, 4), generator=generator())),
    }
    for layer, _ in found.values():
        nn.init.normal_(layer.weight)
        if getattr(layer, "bias", None) is not None:
            nn.init.normal_(layer.bias)
    return {name: (layer.double().requires_grad_(False), x) for name, (layer, x) in found.items()}


LAYER_NAMES = list(layers())


def dense(base: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The layer's output with another weight, given as the matrix (out, in)."""
    stored = (weight.t() if kind_of(base) in ("transposed", "embedding") else weight).reshape(base.weight.shape)
    return torch.func.functional_call(base, {"weight": stored}, (x,))


def formula(weight: torch.Tensor, update: Update) -> torch.Tensor:
    """(1), with the norms as autograd's plain graph; DoRA's row norms are constants, as its paper has them."""
    A, B, alpha, beta = update.A, update.B, update.relative_alpha, update.relative_beta
    if isinstance(update, DoraUpdate):
        merged = weight + B @ A
        d = update.magnitude / merged.detach().norm(dim=1)
        return (alpha - beta) * weight + beta * d[:, None] * merged
    product, norm = B @ A, weight.norm()
    length = product.norm().detach() if update.detach_norm else product.norm()
    return alpha * norm * weight / norm + beta * norm * product / length


@pytest.mark.parametrize("name", LAYER_NAMES)
@pytest.mark.parametrize("variant", ["low-rank", "detached", "dora"])
@pytest.mark.parametrize("fast", [True, False], ids=["own-function", "layer-called"])
def test_output_and_every_gradient_are_those_of_the_formula(name, variant, fast):
    base, x = layers()[name]
    height, width = matrix_shape(base)
    settings = {"relative_alpha": 0.9, "relative_beta": 0.4, "base_norm": float(base.weight.norm())}
    A, B = randn(RANK, width, seed=1), randn(height, RANK, seed=2)
    if variant == "dora":
        update = DoraUpdate(A, B, randn(height, seed=3).abs() + 1, **settings)
    else:
        update = Update(A, B, detach_norm=variant == "detached", **settings)
    update.requires_grad_()
    layer = LAYERS[kind_of(base)](base, name)
    layer.updates["x"], layer.active = update, "x"
    if not fast:
        base.register_forward_hook(lambda *_: None)
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    wanted = dense(base, x, formula(matrix(base, base.weight), update))
    got = layer(x)
    seed = torch.randn(got.shape, generator=generator(9), dtype=torch.float64)
    parameters = [*inputs, *update.parameters()]
    expected = torch.autograd.grad(wanted, parameters, seed)
    found = torch.autograd.grad(got, parameters, seed)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zero", ["base", "update", "both"])
@pytest.mark.parametrize("dora", [False, True])
def test_zero_weights_and_zero_updates_give_no_nan(zero, dora):
    base = nn.Linear(6, 5, bias=False).requires_grad_(False)
    A, B = randn(RANK, 6).float(), randn(5, RANK).float()
    if zero != "update":
        base.weight.zero_()
    if zero != "base":
        B.zero_()
    settings = {"relative_alpha": 1.0, "relative_beta": 0.5, "base_norm": float(base.weight.norm())}
    update = DoraUpdate(A, B, base.weight.norm(dim=1), **settings) if dora else Update(A, B, **settings)
    layer = LAYERS["linear"](base, "layer")
    layer.updates["x"], layer.active = update.requires_grad_(), "x"
    x = randn(2, 6).float().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    for tensor in (y, x.grad, *(parameter.grad for parameter in update.parameters())):
        assert torch.isfinite(tensor).all()
    if zero != "base":
        assert torch.equal(y, base(x))


def test_a_gain_is_not_rounded_to_the_values_dtype():
    values = torch.ones(256, dtype=torch.bfloat16) * 3
    gain = torch.tensor(1.0019)  # bfloat16 has no value between 1 and 1.0078
    exact = (values.double() * gain.double()).bfloat16()
    assert torch.equal(scaled(values, gain), exact)
    assert torch.equal(scaled(values, gain, out=torch.empty_like(values)), exact)
    big = torch.full((64,), 200.0, dtype=torch.bfloat16)
    assert torch.equal(scaled(big, torch.tensor(1.003)), torch.full((64,), 200.6, dtype=torch.bfloat16))


def test_frozen_factors_are_measured_again_after_they_changed():
    """The norm is kept while A and B are frozen; training, loading a state or moving the module must renew it."""
    base = nn.Linear(6, 5, bias=False).double().requires_grad_(False)
    update = Update(
        randn(RANK, 6),
        randn(5, RANK, seed=1),
        relative_alpha=1.0,
        relative_beta=0.5,
        base_norm=float(base.weight.norm()),
    )
    layer = LAYERS["linear"](base, "layer")
    layer.updates["x"], layer.active = update, "x"
    x = randn(2, 6)
    first = layer(x)
    update.requires_grad_()
    layer(x).sum().backward()
    with torch.no_grad():
        update.B.mul_(3).add_(randn(5, RANK, seed=4))
    update.requires_grad_(False)
    second = layer(x)
    torch.testing.assert_close(second, functional.linear(x, formula(base.weight, update)))
    assert not torch.allclose(first, second)
    with torch.no_grad():
        update.B.copy_(randn(5, RANK, seed=6))
    torch.testing.assert_close(layer(x), functional.linear(x, formula(base.weight, update)))
    state = {name: value * 2 if name == "B" else value for name, value in update.state_dict().items()}
    state["A"] = randn(RANK, 6, seed=8)
    update.load_state_dict(state)
    torch.testing.assert_close(layer(x), functional.linear(x, formula(base.weight, update)))
