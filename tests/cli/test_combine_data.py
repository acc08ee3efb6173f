"""``mapconv combine --data``: the sum that is closest in the layers' outputs, against dense float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import mapconv
from mapconv.algebra.moments import DAMPING, InputRoot
from mapconv.refit.products import approximate_product
from mapconv.refit.solving import Wanted
from tests.cli.refusals import assert_refused, nothing_written
from tests.cli.test_combine import LAYER, change, distance, module_of, weight
from tests.cli.test_upgrade_data import LENGTH, write_text
from tests.models import load_base, save_adapter

SETTINGS = {"samples": 24, "sequence_length": 32}


@pytest.fixture(scope="module")
def adapters(base: Path, lora: Path, dora: Path, models: Path) -> dict[str, Path]:
    """Two LoRAs, of which the second has targets and a scaling of its own, and two DoRAs."""
    settings = {"seed": 7, "r": 3, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}
    return {
        "lora": lora,
        "rslora": save_adapter(base, models / "data-rslora", **settings),
        "dora": dora,
        "dora2": save_adapter(base, models / "data-dora2", seed=8, r=2, use_dora=True),
    }


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", 3)


@pytest.mark.parametrize("wanted", [{"rank": 3}, {"tolerance": 0.2}])
def test_a_product_seen_through_its_inputs_is_cut_to_the_optimum(wanted) -> None:
    draw = torch.Generator().manual_seed(0)
    B, A = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((20, 9), (9, 30)))
    P = torch.randn(30, 30, generator=draw, dtype=torch.float64).tril()
    P.diagonal().abs_().add_(0.3)
    asked = Wanted("layer", wanted.get("rank", 9), wanted.get("tolerance"), 9, 1.0, torch.float32)
    made = approximate_product(B, A.float(), asked, root=InputRoot(P.float()))
    A = A.float().double()
    values = torch.linalg.svdvals(B @ A @ P)
    errors = [float(values[k:].norm() / values.norm()) for k in range(len(values) + 1)]
    rank = len(made.A)
    left = (B @ A - made.B.double() @ made.A.double()) @ P
    assert made.output_error == pytest.approx(float(left.norm() / values.norm()), rel=1e-4)
    assert made.output_error == pytest.approx(errors[rank], rel=1e-4)
    assert made.error == pytest.approx(distance(made.B.double() @ made.A.double(), B @ A), rel=1e-4)
    if "tolerance" in wanted:
        assert errors[rank] <= 0.2 < errors[rank - 1]


def root_of(base: Path, adapter: Path, text: Path, layer: str) -> torch.Tensor:
    """P in float64: what the layer is given in the model that an adapter makes, as PEFT runs it."""
    model = PeftModel.from_pretrained(load_base(base), str(adapter)).double()
    seen: list[torch.Tensor] = []
    model.get_submodule(f"base_model.model.{layer}").register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    with torch.no_grad():
        for row in sequences(base, text):
            model(torch.tensor([row]))
    x = torch.cat(seen)
    C = x.T @ x
    C /= C.diagonal().mean()
    return torch.linalg.cholesky(C + DAMPING * torch.eye(len(C), dtype=torch.float64))


def sequences(base: Path, text: Path) -> list[list[int]]:
    from mapconv.data import read_dataset, read_rows
    from mapconv.runtime.models import load_tokenizer

    train, _ = read_dataset(read_rows(text), load_tokenizer(base), length=32, samples=24, classes=None)
    return train.rows()


@pytest.mark.parametrize("kind", ["loras", "doras"])
def test_the_outputs_are_as_close_as_a_rank_brings_them(base: Path, adapters, text: Path, tmp_path: Path, kind) -> None:
    names, weights = (("dora", "dora2"), (0.8, -0.5)) if kind == "doras" else (("lora", "rslora"), (1.0, 0.7))
    parts = [adapters[name] for name in names]
    # What the inputs are taken from: all that the ranks together hold.
    mapconv.combine(parts, tmp_path / "whole", weights=weights)
    result = mapconv.combine(parts, tmp_path / "out", rank=3, data=text, **SETTINGS, weights=weights)
    plain = mapconv.combine(parts, tmp_path / "plain", rank=3, weights=weights)
    P, W = root_of(base, tmp_path / "whole", text, LAYER), weight(base)
    wanted = sum(w * change(base, part) for w, part in zip(weights, parts, strict=True))
    gains = [0.0] if kind == "loras" else torch.linspace(-0.1, 0.1, 81).tolist()
    best = min(float(torch.linalg.svdvals((wanted - t * W) @ P)[3:].norm()) for t in gains)
    found = module_of(result)
    length = float((wanted @ P).norm())
    assert found.output_error == pytest.approx(best / length, rel=3e-3)
    assert float(((change(base, tmp_path / "out") - wanted) @ P).norm()) / length == pytest.approx(
        found.output_error, rel=1e-3
    )
    assert found.output_error < float(((change(base, tmp_path / "plain") - wanted) @ P).norm()) / length
    assert found.error > module_of(plain).error
    assert result.plain_lora == (kind == "loras")
    record = json.loads((tmp_path / "out" / "map_config.json").read_text())
    assert (record["data"]["sequences"], record["options"]["statistics"]) == (24, "full")


def test_the_command_and_what_has_no_use_for_a_text(run, adapters, text: Path, tmp_path: Path) -> None:
    parts = adapters["lora"], adapters["rslora"]
    made = run("combine", *parts, "-o", tmp_path / "out", "--data", text, *LENGTH, "--tolerance", 0.4)
    assert made.status == 0, made.err
    assert "of outputs: worst" in made.out
    modules = json.loads((tmp_path / "out" / "map_config.json").read_text())["modules"]
    assert all(module["output_error"] <= 0.4 for module in modules)
    for words in ([], ["--rank", 7]):
        with nothing_written(tmp_path):
            refused = run("combine", *parts, "-o", tmp_path / "no", "--data", text, *words)
            assert_refused(refused, "is exact, so that --data has nothing to improve", "--rank below 7")
    assert run("combine", *parts, "--samples", 4).status == 2
    settings = {"method": "dare", "density": 0.9, "rank": 3, "data": text, **SETTINGS}
    mixed = mapconv.combine([adapters["dora"], adapters["dora2"]], tmp_path / "mixed", **settings)
    assert all(module.output_error < module.error for module in mixed.modules if "down_proj" in module.path)
    dora = mapconv.combine([adapters["dora"]], tmp_path / "dora", rank=3, direction="dora", data=text, **SETTINGS)
    assert all(module.output_error is not None for module in dora.modules)
