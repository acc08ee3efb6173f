"""``mapconv rebase --calibrate``: training on the other base towards the source on its own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import mapconv
from mapconv.training.loop import Trainer
from tests.cli.test_rebase import rounded_copy
from tests.cli.test_upgrade_data import write_text
from tests.models import save_adapter, save_base

SIZES = {"samples": 8, "sequence_length": 32}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rebase-calibrate")
    base = save_base(folder / "base")
    save_adapter(base, folder / "lora", size=0.05)
    rounded_copy(base, folder / "rounded")
    write_text(folder / "text.txt", 3, 2400)
    return folder


@pytest.fixture
def command_line(bases, tmp_path):
    words = ["rebase", bases / "lora", "--base", bases / "base", "--onto", bases / "rounded", "-o", tmp_path / "out"]
    return [*words, "--samples", "8", "--sequence-length", "32"]


def weight_error(bases, out, path):
    """‖T − W'‖ / ‖T − W‖ of a module of plain LoRAs, from their files."""

    def update(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        A, B = (tensors[f"base_model.model.{path}.lora_{name}.weight"].double() for name in "AB")
        return config["lora_alpha"] / config["r"] * B @ A

    trained, other = (
        load_file(bases / name / "model.safetensors")[f"{path}.weight"].double() for name in ("base", "rounded")
    )
    wanted = trained + update(bases / "lora")
    return float(torch.linalg.norm(wanted - other - update(out)) / torch.linalg.norm(wanted - other))


def test_it_comes_closer_and_stays_a_plain_lora(bases, command_line, run, tmp_path):
    result = run(*command_line, "--data", bases / "text.txt", "--calibrate", "6")
    assert result.status == 0, result.err
    out = tmp_path / "out"
    assert not any("magnitude" in name for name in load_file(out / "adapter_model.safetensors"))
    record = json.loads((out / "map_config.json").read_text())
    training = record["calibration"]
    before, after = (training["models"][name]["kl"] for name in ("closed form", "calibrated"))
    assert training["hold_gain"]
    assert training["best_step"] > 0
    assert after < before
    # The same sequences by stock PEFT, from the files, in other batches.
    assert record["rebase"]["served"]["rebased"]["kl"] == pytest.approx(after, rel=1e-3)
    assert record["base"]["name"] == str(bases / "rounded")
    for module in record["modules"]:
        assert module["alpha"] == module["alpha_before"] == module["base_norm"]
        assert module["error"] == pytest.approx(weight_error(bases, out, module["path"]), rel=1e-4)
    assert "a plain LoRA adapter" in result.out


def test_without_data_it_trains_on_own_samples_and_equal_seeds_give_equal_bytes(bases, tmp_path):
    for name in ("one", "two"):
        result = mapconv.rebase(
            bases / "lora", tmp_path / name, base=bases / "base", onto=bases / "rounded", calibrate=2, seed=7, **SIZES
        )
        assert result.calibration.train_sequences == 8
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_free_gain_is_trained(bases, tmp_path):
    options = {"base": bases / "base", "onto": bases / "rounded", "data": bases / "text.txt", "calibrate": 1, **SIZES}
    result = mapconv.rebase(
        bases / "lora", tmp_path / "free", statistics="none", rank=8, free_gain=True, keep_worse=True, **options
    )
    factors = [t for name, t in load_file(result.out / "adapter_model.safetensors").items() if "magnitude" not in name]
    # Beside its factors, a module has the length of its update, and with a free gain that of the base.
    assert result.calibration.trained_parameters == sum(t.numel() for t in factors) + 2 * len(result.modules)


def test_ctrl_c_writes_the_best_so_far(bases, command_line, run, monkeypatch, tmp_path):
    step = Trainer._step

    def interrupted(trainer, bar):
        if trainer.progress.step == 2:
            raise KeyboardInterrupt
        step(trainer, bar)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    result = run(*command_line, "--data", bases / "text.txt", "--calibrate", "5")
    assert result.status == 130, result.err
    assert "interrupted after step 2 of 5" in result.err
    record = json.loads((tmp_path / "out" / "map_config.json").read_text())
    assert record["calibration"]["steps"] == 2
    assert record["rebase"]["served"]["positions"] > 0


@pytest.mark.parametrize("without", [["--statistics", "none"], ["--statistics-from", "stats"]])
def test_training_without_text_is_refused(without, bases, run, tmp_path):
    (tmp_path / "stats").mkdir()
    without = [str(tmp_path / word) if word == "stats" else word for word in without]
    words = ["rebase", bases / "lora", "--onto", bases / "rounded", "-o", tmp_path / "out", "--calibrate", "5"]
    result = run(*words, *without)
    assert result.status == 2
    assert "--calibrate" in result.err
    assert "requires --data" in result.err
    assert not (tmp_path / "out").exists()
