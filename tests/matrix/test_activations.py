"""Second moments of the layers' inputs in every family of text models, against a plain float64 run of stock PEFT."""

from __future__ import annotations

import pytest
import torch

from mapconv.algebra.moments import DAMPING
from mapconv.data import Dataset
from mapconv.placement.adapters import place_adapter
from mapconv.refit import activations
from mapconv.refit.activations import input_roots

from .models import MODELS
from .options import OPTIONS
from .oracle import Workshop, load_adapter
from .tiny import LENGTH, VOCAB

BY_NAME = {option.name: option for option in OPTIONS}
#: Sequences of two lengths, so that not all fit in one batch.
COUNTS = ((LENGTH, 11), (LENGTH - 2, 3))
FAMILIES = ["llama", "gemma3", "gpt2", "bert", "bert-classifier", "distilbert-classifier", "t5", "mixtral"]
CASES = [
    (name, option)
    for name in FAMILIES
    for option in ("dora", "embedding-dora", "head-dora")
    if BY_NAME[option].applies(MODELS[name])
]


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n, count in COUNTS for _ in range(count)]


def dataset() -> Dataset:
    ids = torch.zeros(sum(count for _, count in COUNTS), LENGTH, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows()):
        ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
    return Dataset("text", ids, mask, ids)


def expected_moments(case, paths: set[str]) -> dict[str, torch.Tensor]:
    """Σ x xᵀ of each layer over the same rows, those of one length together, by stock PEFT's model in float64."""
    model = load_adapter(case, case.adapter).get_base_model().double()
    sums: dict[str, torch.Tensor] = {}

    def count(path: str):
        def hook(_, arguments) -> None:
            x = arguments[0]
            if not x.is_floating_point():
                x = torch.nn.functional.one_hot(x, VOCAB).double()
            x = x.reshape(-1, x.shape[-1])
            sums[path] = sums.get(path, 0) + x.T @ x

        return hook

    for name, module in model.named_modules():
        if name in paths:
            module.register_forward_pre_hook(count(name))
    with torch.no_grad():
        for length, _ in COUNTS:
            inputs = {"input_ids": torch.tensor([row for row in rows() if len(row) == length])}
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = inputs["input_ids"]
            model(**inputs)
    return sums


def collected(case, **options) -> tuple[list[list[str]], dict[str, torch.Tensor]]:
    placed = place_adapter(case.adapter, case.base)
    order, roots = [], {}
    for modules, found in input_roots(placed, dataset(), device=torch.device("cpu"), **options):
        order.append([item.module.path for item in modules])
        roots |= {item.module.path: found.get(item.module.path) for item in modules}
    return order, roots


@pytest.mark.parametrize(("name", "option"), CASES)
def test_moments_are_those_of_a_plain_run(name, option, workshop: Workshop):
    tiny = MODELS[name]
    case = workshop.case(tiny, BY_NAME[option])
    _, roots = collected(case, statistics="full")
    expected = expected_moments(case, set(roots))
    assert roots.keys() == expected.keys()
    for path, moment in expected.items():
        P = roots[path].factor.double()
        found = P @ P.T if P.ndim == 2 else torch.diag(P.square())
        wanted = moment / moment.diagonal().mean() + DAMPING * torch.eye(len(moment))
        # The model runs in float32: a few hundred roundings on the way through two layers and a normalisation.
        torch.testing.assert_close(found, wanted, rtol=0, atol=400 * 2**-24 * float(wanted.max()))


def test_layers_with_one_input_share_one_root(workshop: Workshop):
    case = workshop.case(MODELS["llama"], BY_NAME["all-linear-dora"])
    order, roots = collected(case, statistics="full")
    for layer in ("model.layers.0", "model.layers.1"):
        attention = [roots[f"{layer}.self_attn.{name}"] for name in ("q_proj", "k_proj", "v_proj")]
        mlp = [roots[f"{layer}.mlp.{name}"] for name in ("gate_proj", "up_proj")]
        assert all(root is attention[0] for root in attention)
        assert all(root is mlp[0] for root in mlp)
        assert roots[f"{layer}.mlp.down_proj"] is not mlp[0] is not attention[0]
    assert [{path.split(".self_attn")[0].split(".mlp")[0] for path in group} for group in order] == [
        {"model.layers.0"},
        {"model.layers.1"},
    ]


def test_diagonal_statistics_are_the_diagonal(workshop: Workshop):
    case = workshop.case(MODELS["llama"], BY_NAME["dora"])
    full, diagonal = (collected(case, statistics=kind)[1] for kind in ("full", "diagonal"))
    for path, root in diagonal.items():
        P = full[path].factor
        torch.testing.assert_close(root.factor.square(), (P @ P.T).diagonal(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", ["lora", "all-linear-dora"])
def test_the_model_is_left_as_it_was(option, workshop: Workshop):
    case = workshop.case(MODELS["llama"], BY_NAME[option])
    model = load_adapter(case, case.adapter).get_base_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    placed = place_adapter(case.adapter, case.base)
    list(activations.roots_of(model, case.base, placed.modules, dataset(), "full", torch.device("cpu")))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(getattr(layer, "merged", False) for layer in model.modules())


def test_one_block_at_a_time_is_in_float32(workshop: Workshop, monkeypatch):
    """A bfloat16 model computes in float32, and only the block at work is stored in it."""
    case = workshop.case(MODELS["llama"], BY_NAME["all-linear-dora"])
    made, load = [], activations._source_model

    def half(placed, device, **settings):
        made.append(load(placed, device, **settings))
        for block in made[0].model.layers:
            block.to(torch.bfloat16)
        return made[0]

    monkeypatch.setattr(activations, "_source_model", half)
    placed, seen = place_adapter(case.adapter, case.base), []
    for _ in input_roots(placed, dataset(), statistics="full", device=torch.device("cpu")):
        seen.append([{p.dtype for p in block.parameters()} for block in made[0].model.layers])
    assert seen == [[{torch.bfloat16}, {torch.bfloat16}]] * 2
