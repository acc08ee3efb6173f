"""A LoRA is resized by its own factors: the optimum of a dense SVD, with no weight read and no matrix formed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import mapconv
from mapconv.algebra import pencil
from mapconv.placement import weights as placed_weights
from mapconv.refit.products import approximate_product

KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"


def update(folder, scaling=1.0):
    tensors = load_file(folder / "adapter_model.safetensors")
    return scaling * tensors[KEY.format("B")].double() @ tensors[KEY.format("A")].double()


@pytest.fixture
def no_matrix(monkeypatch):
    """Make reading a whole weight, and holding a dense pencil, an error."""

    def refuse(*arguments, **options):
        raise AssertionError("a resize formed a matrix")

    monkeypatch.setattr(placed_weights, "read_weight", refuse)
    monkeypatch.setattr("mapconv.refit.converter.read_weight", refuse)
    monkeypatch.setattr(pencil.DensePencil, "__init__", refuse)
    monkeypatch.setattr("mapconv.refit.converter.AdaptedWeight", refuse)


@pytest.mark.parametrize("options", [{"rank": 2}, {"tolerance": 0.4}, {"rank_at_most": 2}])
def test_it_is_the_best_approximation(lora, tmp_path, no_matrix, options):
    result = mapconv.upgrade(lora, tmp_path / "out", **options)
    wanted = update(lora, 2.0)  # alpha / r
    values = torch.linalg.svdvals(wanted).square()
    found = next(module for module in result.modules if module.path.endswith("layers.0.mlp.up_proj"))
    best = float(values[found.rank :].sum() / values.sum()) ** 0.5
    assert found.error == pytest.approx(best, rel=1e-5)
    assert float((update(tmp_path / "out") - wanted).norm() / wanted.norm()) == pytest.approx(best, rel=1e-5)
    assert result.plain_lora
    if "tolerance" in options:
        assert best <= 0.4 < float(values[found.rank - 1 :].sum() / values.sum()) ** 0.5
    else:
        assert {module.rank for module in result.modules} == {2}


def test_one_rank_for_all_modules(lora, dora, tmp_path):
    for name, source in (("lora", lora), ("dora", dora)):
        result = mapconv.upgrade(source, tmp_path / name, rank_at_most=6)
        assert {module.rank for module in result.modules} == {6}
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {len(value) for key, value in tensors.items() if "lora_A" in key} == {6}
    assert max(module.error for module in mapconv.upgrade(lora, tmp_path / "again", rank_at_most=6).modules) < 1e-6
    assert mapconv.verify(tmp_path / "lora", lora).kl < 1e-9


@pytest.mark.parametrize("limit", [{"rank": 2}, {"tolerance": 0.4}])
@pytest.mark.parametrize("statistics", ["full", "diagonal"])
def test_with_data_it_is_the_best_for_the_outputs(lora, text, tmp_path, no_matrix, monkeypatch, limit, statistics):
    seen = {}

    def spy(B, A, wanted, **options):
        seen[wanted.path] = B, A, options["root"].factor.double()
        return approximate_product(B, A, wanted, **options)

    monkeypatch.setattr("mapconv.refit.converter.approximate_product", spy)
    settings = {"samples": 4, "sequence_length": 32, "statistics": statistics}
    result = mapconv.upgrade(lora, tmp_path / "out", data=text, **limit, **settings)
    assert result.plain_lora
    assert len(seen) == len(result.modules)
    for module in result.modules:
        B, A, root = seen[module.path]
        wanted = B.double() @ A.double() @ (root if root.ndim == 2 else root.diag())
        values = torch.linalg.svdvals(wanted).square()
        best = float(values[module.rank :].sum() / values.sum()) ** 0.5
        assert module.output_error == pytest.approx(best, abs=1e-5)
        if "tolerance" in limit:
            assert best <= 0.4 + 1e-5
            assert float(values[module.rank - 1 :].sum() / values.sum()) ** 0.5 > 0.4
