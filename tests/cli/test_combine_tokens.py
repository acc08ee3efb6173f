"""Combining adapters of which some train rows of an embedding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import MapconvError
from tests.models import save_adapter


def test_token_rows_of_one_adapter_move_by_its_weight(base: Path, lora: Path, tmp_path: Path) -> None:
    rows = save_adapter(base, tmp_path / "rows", trainable_token_indices=[3, 5])
    values = load_file(rows / "adapter_model.safetensors")
    key = next(name for name in values if "trainable_tokens" in name)
    save_file(values | {key: values[key] + 1.0}, rows / "adapter_model.safetensors")
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    for order in ([lora, rows], [rows, lora]):
        for weight, said in ((1.0, "is carried"), (-0.5, "its change is weighed by -0.5")):
            weights = [weight if adapter == rows else 1.0 for adapter in order]
            made = mapconv.combine(order, tmp_path / "out", weights=weights, force=True)
            assert any(said in note for note in made.notes)
            mapconv.merge(made.out, tmp_path / "merged", base=base, force=True)
            after = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
            wanted = before.clone()
            wanted[[3, 5]] += weight
            assert torch.allclose(after, wanted, atol=1e-6)


def test_token_rows_that_no_one_adapter_can_hold(base: Path, tmp_path: Path) -> None:
    rows = save_adapter(base, tmp_path / "rows", trainable_token_indices=[3, 5])
    others = save_adapter(base, tmp_path / "others", trainable_token_indices=[3, 6])
    factors = save_adapter(base, tmp_path / "factors", target_modules=["embed_tokens"])
    for other, said in ((others, "train other token rows"), (factors, "trains token rows of .* has factors for")):
        with pytest.raises(MapconvError, match=said):
            mapconv.combine([rows, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_weights_and_tolerances_could_not_do_is_said(base: Path, lora: Path, tmp_path: Path) -> None:
    other, head = (
        save_adapter(base, tmp_path / "b", seed=5),
        save_adapter(base, tmp_path / "h", modules_to_save=["lm_head"]),
    )
    for adapters, options, said in (
        ([lora, lora], {"weights": [1, -1]}, "the weighed changes cancel"),
        ([lora, other], {"tolerance": 0.1, "max_rank": 1}, "--max-rank 1 leaves 14 modules above ε = 0.1"),
        ([lora, other], {"whole": "first"}, "--whole decides nothing"),
        ([lora, head], {"weights": [1, 0.5]}, "the weight 0.5 is for changes by factors"),
    ):
        made = mapconv.combine(adapters, tmp_path / "out", base=base, force=True, **options)
        assert any(said in note for note in made.notes), said
