"""MAP trained from scratch: what is targeted, where it starts, what it costs in memory, loops and Trainer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks

import mapconv
from mapconv.errors import PlacementError
from mapconv.nn import (
    MapConfig,
    factor_parameters,
    get_map_model,
    load_adapter,
    map_layers,
    save_adapter,
    scalar_parameters,
)
from tests.models import load_adapted, load_base, log_probabilities, prompts
from tests.nn.test_running import close


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 14),
        ({"targets": ["q_proj", "down_proj"]}, 4),
        ({"targets": r".*\.1\.mlp\..*_proj"}, 3),
        ({"targets": ["q_proj", "lm_head", "embed_tokens"]}, 4),
        ({"exclude": ["q_proj"], "layers": [1]}, 6),
        ({"exclude": r".*mlp.*"}, 8),
    ],
)
def test_targets(base, settings, count):
    model = get_map_model(load_base(base), MapConfig(rank=2, **settings))
    assert len(map_layers(model)) == count
    assert len(scalar_parameters(model, "default")) == len(factor_parameters(model, "default")) == 2 * count
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    leaves = ("A", "B", "relative_alpha", "relative_beta")
    assert trained == {f"{path}.updates.default.{leaf}" for path in map_layers(model) for leaf in leaves}


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": True}, "rank"),
        ({"direction": "low_rank"}, "direction"),
        ({"targets": []}, "targets"),
        ({"targets": "("}, "regular expression"),
        ({"exclude": [3]}, "exclude"),
        ({"layers": [-1]}, "layers"),
        ({"direction": "dora", "detach_norm": True}, "detach_norm"),
    ],
)
def test_a_config_without_meaning_is_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        MapConfig(**settings)


def test_targets_that_are_not_there_are_named(base):
    model = load_base(base)
    with pytest.raises(PlacementError, match="q_proj"):
        get_map_model(model, MapConfig(targets=["query"]))
    with pytest.raises(PlacementError, match="'query'"):
        get_map_model(model, MapConfig(targets=["q_proj", "query"]))
    assert not map_layers(model)


@pytest.mark.parametrize("direction", ["low-rank", "dora"])
def test_training_starts_from_the_base_and_lowers_the_loss(base, tmp_path, direction):
    model = load_base(base)
    plain = log_probabilities(model)
    get_map_model(model, MapConfig(rank=4, direction=direction))
    # At α = ‖W0‖ and β = 0 no value is rounded anew; a DoRA divides each row by its norm and multiplies by it.
    assert close(log_probabilities(model), plain, atol=1e-6 if direction == "low-rank" else 1e-4)
    losses = train(model, steps=8)
    assert losses[-1] < losses[0] - 0.1
    assert all(parameter.grad is not None for parameter in factor_parameters(model, "default"))
    live = log_probabilities(model)
    save_adapter(model, tmp_path / "map")
    assert close(log_probabilities(load_adapted(base, tmp_path / "map")), live)


def train(model, *, steps: int, rate: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    tokens, losses = prompts(), []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(float(loss.detach()))
    return losses


def test_scalars_alone_and_a_zero_update_can_be_trained(base, lora, own_lora, tmp_path):
    from tests.files import edit_tensors

    model = load_adapter(load_base(base), lora, trainable="scalars")
    assert train(model, steps=4)[-1] < train(model, steps=1)[0] + 10
    losses = train(model, steps=4)
    assert losses[-1] < losses[0]

    def untrained(tensors):
        for name in [name for name in tensors if ".lora_B." in name]:
            tensors[name] = torch.zeros_like(tensors[name])

    edit_tensors(own_lora / "adapter_model.safetensors", untrained)
    model = load_base(base)
    plain = log_probabilities(model)
    load_adapter(model, own_lora, trainable="all")
    assert close(log_probabilities(model), plain)
    losses = train(model, steps=8)
    assert losses[-1] < losses[0] - 0.1


def saved_bytes(model) -> int:
    """Bytes that one forward pass keeps for the backward pass, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = prompts()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, labels=tokens).loss  # kept alive, so that no storage is counted as another
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_is_saved_for_backward_than_by_lora(base, dtype):
    config = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")
    peft = saved_bytes(get_peft_model(load_base(base, dtype), config).train())
    dora = saved_bytes(
        get_peft_model(load_base(base, dtype), LoraConfig(**config.to_dict() | {"use_dora": True})).train()
    )
    ours = saved_bytes(get_map_model(load_base(base, dtype), MapConfig(rank=4)).train())
    # Beside x and Ax, 14 weights keep two Gram matrices, a norm and a few numbers each, in float64.
    assert ours <= peft + 14 * 8 * (2 * 4 * 4 + 8)
    assert ours < dora
    assert saved_bytes(get_map_model(load_base(base, dtype), MapConfig(rank=4, direction="dora")).train()) < dora


def test_a_configuration_takes_pefts_names():
    theirs = MapConfig(r=4, target_modules=["q_proj"], exclude_modules=["v_proj"], layers_to_transform=[0])
    assert theirs == MapConfig(rank=4, targets=("q_proj",), exclude=("v_proj",), layers=(0,))
    with pytest.raises(ValueError, match="r and rank are the same"):
        MapConfig(r=4, rank=4)
    with pytest.raises(TypeError, match="'lora_alpha': expected rank, targets"):
        MapConfig(lora_alpha=4)
    with pytest.raises(TypeError, match="did you mean direction"):
        MapConfig(directon="dora")


def test_trainable_parameters_are_printed_as_peft_does(capsys):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    mapconv.print_trainable_parameters(model)
    assert capsys.readouterr().out == "trainable params: 10 || all params: 26 || trainable%: 38.4615\n"
