"""``mapconv extract`` on what is no finetune of the base: one sentence, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import MapconvError
from tests.cli.test_extract import everywhere, finetuned
from tests.files import copy


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    return finetuned(base, tmp_path / "tuned", everywhere)


def refused(tuned: Path, base: Path, tmp_path: Path, match: str, **options) -> None:
    with pytest.raises(MapconvError, match=match) as error:
        mapconv.extract(tuned, tmp_path / "out", base=base, **options)
    assert str(error.value).rstrip().count("\n") <= 6
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial*"))


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_another_lineage_and_force(base: Path, other_base: Path, tmp_path: Path) -> None:
    refused(other_base, base, tmp_path, r"have a cosine of -?0\.0\d+ with those of .*pass --force")
    forced = mapconv.extract(other_base, tmp_path / "out", base=base, force=True, rank=2)
    assert forced.worst_error > 0.5
    assert [note for note in forced.notes if note.startswith("accepted with --force: the weights of ")]


def test_swapped_arguments(base: Path, tuned: Path, tmp_path: Path) -> None:
    (tuned / "README.md").write_text(f"---\nbase_model: {base.name}\n---\n")
    refused(base, tuned, tmp_path, "look swapped")


def test_the_same_weights_and_the_same_folder(base: Path, tmp_path: Path) -> None:
    refused(base, base, tmp_path, "is the base itself")
    refused(copy(base, tmp_path / "copy"), base, tmp_path, "nothing to extract")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_is_named(base: Path, tuned: Path, tmp_path: Path, name: str) -> None:
    rewrite(tuned, lambda weights: weights[name].view(-1)[-1:].fill_(float("nan")))
    refused(tuned, base, tmp_path, f"{name} holds NaN or infinity")


def test_missing_tensors(base: Path, tuned: Path, tmp_path: Path) -> None:
    rewrite(tuned, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refused(tuned, base, tmp_path, r"layers\.1\.mlp\.up_proj\.weight: .* has no such tensor")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("model_type", "qwen2", "another architecture"),
        ("num_hidden_layers", 1, "has it alone"),
        ("intermediate_size", 40, r"\[48, 32\] in the base"),
    ],
)
def test_other_architectures(base: Path, tuned: Path, tmp_path: Path, field: str, value, match: str) -> None:
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {field: value}))
    refused(tuned, base, tmp_path, match)


def test_only_norms_differ(base: Path, tmp_path: Path) -> None:
    tuned = finetuned(base, tmp_path / "tuned", lambda name, weight: weight * 1.1 if weight.ndim == 1 else None)
    refused(tuned, base, tmp_path, "an adapter needs one")


def test_an_adapter_is_no_finetune(base: Path, lora: Path, tmp_path: Path) -> None:
    refused(lora, base, tmp_path, "use `mapconv upgrade` on it")
    refused(tmp_path / "none", base, tmp_path, "neither a folder nor a Hub id")


def test_options_out_of_range(run, base: Path, tuned: Path, tmp_path: Path) -> None:
    for options in (["--rank", 0], ["--tolerance", 2], ["--rank", 4, "--tolerance", 0.1], ["--targets", ""]):
        assert run("extract", tuned, "--base", base, "-o", tmp_path / "out", *options).status == 2
    assert run("extract", tuned, "-o", tmp_path / "out").status == 2


def test_a_run_that_fails_while_it_writes_leaves_nothing(base: Path, tuned: Path, tmp_path: Path, monkeypatch) -> None:
    from mapconv.refit.directory import MapDirectory

    def fail(self, item, result) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(MapDirectory, "add", fail)
    with pytest.raises(torch.OutOfMemoryError):
        mapconv.extract(tuned, tmp_path / "out", base=base)
    assert {path.name for path in tmp_path.iterdir()} == {"tuned"}
