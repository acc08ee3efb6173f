"""Adapters on a live model: several at once, switched, detached; dtypes, autocast, checkpointing, compile, offload."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import mapconv
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.nn import (
    MapConfig,
    MapLayer,
    active_adapter,
    detach,
    disabled,
    factor_parameters,
    get_map_model,
    load_adapter,
    map_layers,
    merge_adapter,
    save_adapter,
    scalar_parameters,
    set_adapter,
    unmerge_adapter,
)
from tests.models import TARGETS, load_adapted, load_base, log_probabilities, prompts
from tests.models import save_adapter as save_with_peft


def close(left: torch.Tensor, right: torch.Tensor, *, atol: float = 1e-4) -> bool:
    """Log-probabilities of a float32 model: errors of 1e-7 grow a hundredfold on the way through it."""
    return float((left - right).abs().max()) < atol


def gradients(model, tokens=None) -> dict[str, torch.Tensor]:
    tokens = prompts()[:2, :16] if tokens is None else tokens
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(left, right, rtol: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        error = (left[name] - right[name]).norm() / right[name].norm().clamp_min(1e-12)
        assert error < rtol, (name, float(error))


def test_a_source_and_its_conversion_share_one_base(base, dora, map_dir):
    model = load_base(base)
    plain = log_probabilities(model)
    load_adapter(model, dora, name="source")
    load_adapter(model, map_dir, name="map", trainable="scalars")
    source, converted = log_probabilities(load_adapted(base, dora)), log_probabilities(load_adapted(base, map_dir))
    assert active_adapter(model) == "map"
    for name, wanted in (("source", source), ("map", converted), (None, plain), ("source", source)):
        set_adapter(model, name)
        assert close(log_probabilities(model), wanted)
    with disabled(model):
        assert active_adapter(model) is None
        assert torch.equal(log_probabilities(model), plain)
    assert active_adapter(model) == "source"
    assert [p.shape for p in scalar_parameters(model, "map")] == [(1,)] * 28
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.updates.map.relative_{s}" for path in map_layers(model) for s in ("alpha", "beta")}
    detach(model, "map")
    assert close(log_probabilities(model), source)
    detach(model)
    assert not map_layers(model)
    assert torch.equal(log_probabilities(model), plain)


def test_scalars_are_absolute_and_exact(base, map_dir):
    model = load_adapter(load_base(base), map_dir)
    for scalars in mapconv.formats.read_adapter(map_dir).map_modules:
        layer = map_layers(model)[scalars.path]
        assert isinstance(layer, MapLayer)
        assert (layer.alpha("default"), layer.beta("default")) == (scalars.alpha, scalars.beta)
        assert layer.gains("default") == pytest.approx((scalars.base_gain, scalars.update_gain), rel=1e-6)


def test_detach_gives_the_model_back_as_it_was(base, lora):
    model = load_base(base)
    model.model.embed_tokens.weight.requires_grad_(False)
    modules, flags = dict(model.named_modules()), {n: p.requires_grad for n, p in model.named_parameters()}
    load_adapter(model, lora, trainable="all")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".updates." not in n)
    detach(model)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    with pytest.raises(AdapterError, match="has no MAP adapter"):
        detach(model)


def test_merge_and_unmerge(base, map_dir, lora):
    model = load_adapter(load_base(base), map_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    live = log_probabilities(model)
    merge_adapter(model)
    assert close(log_probabilities(model), live)
    assert not torch.equal(
        model.state_dict()["model.layers.0.mlp.up_proj.base_layer.weight"],
        before["model.layers.0.mlp.up_proj.base_layer.weight"],
    )
    with pytest.raises(UnsupportedError, match="unmerge_adapter"):
        set_adapter(model, None)
    with pytest.raises(UnsupportedError, match="unmerge_adapter"):
        load_adapter(model, lora, name="other")
    unmerge_adapter(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_part_of_the_model_takes_the_adapter_too(base, map_dir):
    whole, part = load_adapter(load_base(base), map_dir), load_base(base)
    load_adapter(part.model, map_dir)
    assert torch.equal(log_probabilities(part), log_probabilities(whole))


@pytest.mark.parametrize("direction", ["low-rank", "dora"])
def test_bfloat16_keeps_masters_in_float32(base, dora, tmp_path, direction):
    mapconv.upgrade(dora, tmp_path / "map", base=base, direction=direction)
    exact = log_probabilities(load_adapted(base, tmp_path / "map"))
    model = load_adapter(load_base(base, torch.bfloat16), tmp_path / "map", trainable="all")
    ours = log_probabilities(model)
    theirs = log_probabilities(load_adapted(base, tmp_path / "map", torch.bfloat16))
    # No further from the float32 model than stock PEFT in bfloat16 (both a few roundings of 2⁻⁸ through two layers).
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()
    for layer in map_layers(model).values():
        layer.updates.to(torch.float16)
    assert {p.dtype for p in factor_parameters(model, "default")} == {torch.float32}
    assert torch.equal(log_probabilities(model), ours)
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


@pytest.mark.parametrize("direction", ["low-rank", "dora"])
def test_autocast(base, direction):
    model = get_map_model(load_base(base), MapConfig(rank=4, direction=direction))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in scalar_parameters(model, "default"):
            parameter.add_(0.2)
        for parameter in factor_parameters(model, "default"):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    exact = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = gradients(model)
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    # bfloat16 keeps 8 bits, and a gradient passes through some twenty products; single scalars may cancel.
    for leaf in {name.rpartition(".")[2] for name in exact}:
        left, right = (torch.cat([g[n].flatten() for n in g if n.endswith(f".{leaf}")]) for g in (rounded, exact))
        assert (left - right).norm() < 20 * 2**-8 * right.norm(), leaf


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(base, reentrant):
    model = get_map_model(load_base(base), MapConfig(rank=4)).train()
    with torch.no_grad():
        for parameter in scalar_parameters(model, "default"):
            parameter.add_(0.2)
    exact = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same_gradients(gradients(model), exact, rtol=1e-5)


@pytest.mark.parametrize("trainable", ["none", "all"])
def test_compile(base, map_dir, trainable, monkeypatch):
    """Without a break in the graph, and with the gradients of the eager model."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")  # of tests/conftest.py
    model = load_adapter(load_base(base), map_dir, trainable=trainable)
    block = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def run(module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        x.grad = None
        y = module(x)
        y.square().sum().backward()
        found = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
        return y.detach(), found | {"x": x.grad}

    torch.compiler.reset()
    compiled, found = run(torch.compile(block, fullgraph=True, backend="aot_eager"))
    eager, wanted = run(block)
    torch.testing.assert_close(compiled, eager)
    assert_same_gradients(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("direction", ["low-rank", "dora"])
def test_scalars_train_after_a_pass_in_inference_mode(base, dora, tmp_path, direction):
    """What a layer keeps from one pass to the next must not be an inference tensor."""
    mapconv.upgrade(dora, tmp_path / "map", base=base, direction=direction)
    model = load_adapter(load_base(base), tmp_path / "map", trainable="scalars")
    wanted = gradients(model)
    again = load_adapter(load_base(base), tmp_path / "map", trainable="scalars")
    log_probabilities(again)  # under inference_mode
    assert_same_gradients(gradients(again), wanted, rtol=1e-6)


def test_offloaded_layers(base, dora, map_dir, tmp_path):
    """accelerate keeps a layer on disk, with its weight on the meta device between calls."""
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(base, device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    plain = load_base(base)
    for adapter in (map_dir, dora):
        load_adapter(model, adapter)
        load_adapter(plain, adapter)
        assert close(log_probabilities(model), log_probabilities(plain))
        save_adapter(model, tmp_path / f"{adapter.name}-saved")
        with pytest.raises(UnsupportedError, match="offloaded"):
            merge_adapter(model)
        detach(model)
        detach(plain)
    assert close(log_probabilities(model), log_probabilities(plain))


def test_a_device_map_of_one_device(base, map_dir):
    model = AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"})
    load_adapter(model, map_dir)
    assert close(log_probabilities(model), log_probabilities(load_adapted(base, map_dir)))


def test_whole_tensors_come_and_go_with_their_adapter(base, tmp_path):
    settings = {"target_modules": TARGETS[:2], "modules_to_save": ["lm_head"], "bias": "none"}
    first = save_with_peft(base, tmp_path / "first", seed=2, **settings)
    model = load_base(base)
    head = model.lm_head.weight
    plain = log_probabilities(model)
    load_adapter(model, first, name="first")
    assert model.lm_head.weight is not head
    load_adapter(model, first, name="second")
    detach(model, "first")
    assert close(log_probabilities(model), log_probabilities(load_adapted(base, first)))
    with disabled(model):
        assert model.lm_head.weight is head
        assert torch.equal(log_probabilities(model), plain)
    detach(model)
    assert model.lm_head.weight is head
