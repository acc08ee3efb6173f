"""Calibration as a whole, on a tiny DoRA refitted at its own rank; stock PEFT measures what was written."""

from __future__ import annotations

import filecmp
import json

import pytest
import torch

import mapconv
from mapconv.data import read_dataset, read_rows
from mapconv.formats import read_adapter
from mapconv.runtime.models import load_tokenizer
from tests.files import copy, edit_json, read_tensors
from tests.models import kl, load_adapted, load_base
from tests.training.conftest import SETTINGS, read_record

WEIGHTS = ("adapter_model.safetensors", "adapter_config.json")


@pytest.fixture(scope="module")
def results(closed_form, source, text, tmp_path_factory):
    """Both kinds of training, 12 steps each."""
    folder = tmp_path_factory.mktemp("calibrated")
    return {
        train: mapconv.calibrate(
            closed_form, against=source, data=text, out=folder / train, train=train, steps=12, **SETTINGS
        )
        for train in ("scalars", "all")
    }


@pytest.fixture(scope="module")
def held_out(base, text):
    """The blocks that the runs hold out, (6, 32)."""
    settings = {"length": SETTINGS["sequence_length"], "held_out": SETTINGS["held_out"]}
    return read_dataset(read_rows(text), load_tokenizer(base), **settings)[1].input_ids


@torch.inference_mode()
def log_probabilities(model, tokens):
    return model(tokens).logits[:, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("train", ["scalars", "all"])
def test_every_number_is_one_that_stock_peft_measures_on_the_files(train, results, closed_form, base, source, held_out):
    folders = {"source": source, "closed form": closed_form, "calibrated": results[train].out}
    found = {name: log_probabilities(load_adapted(base, folder), held_out) for name, folder in folders.items()}
    found["base"] = log_probabilities(load_base(base), held_out)
    assert results[train].models.keys() == found.keys()
    targets = held_out[:, 1:, None]
    for name, numbers in results[train].models.items():
        # float32 forward passes by other code differ by some 1e-6 in a logit.
        assert numbers.kl == pytest.approx(kl(found["source"], found[name]), rel=1e-3, abs=1e-9)
        assert numbers.perplexity == pytest.approx(float((-found[name].gather(2, targets).mean()).exp()), rel=1e-5)
        same = (found[name].argmax(-1) == found["source"].argmax(-1)).double().mean()
        assert numbers.top1_agreement == pytest.approx(float(same))


def test_training_gains_on_the_closed_form_and_factors_gain_more(results):
    scalars, everything = (results[train].models for train in ("scalars", "all"))
    start = scalars["closed form"].kl
    assert scalars["calibrated"].kl < 0.95 * start
    assert everything["calibrated"].kl < 0.9 * scalars["calibrated"].kl
    # The same model in two runs: a float32 product may be summed in another order each time.
    assert everything["closed form"].kl == pytest.approx(start, rel=1e-5)
    assert results["scalars"].report.trained_parameters == 2 * 14


def test_scalars_leave_the_direction_as_it_was(results, closed_form):
    before, after = read_tensors(closed_form), read_tensors(results["scalars"].out)
    for name, tensor in before.items():
        if ".lora_A." in name:
            assert torch.equal(after[name], tensor)
        elif ".lora_B." in name:
            # B takes the quotient of the gains: parallel to what it was, but for rounding to float32.
            cosine = torch.nn.functional.cosine_similarity(after[name].flatten(), tensor.flatten(), dim=0)
            assert cosine == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("train", ["scalars", "all"])
def test_errors_are_those_of_the_merged_weights(train, results, closed_form, base, source):
    """ε before is what upgrade recorded; ε after is measured again here, on weights merged in float64."""
    for name, error in (("before", "error_before"), ("after", "error")):
        folder = closed_form if name == "before" else results[train].out
        mapconv.merge(folder, results[train].out.parent / f"{train}-{name}")
        mapconv.merge(source, results[train].out.parent / "merged-source", force=True)
        merged, exact = (
            read_tensors(results[train].out.parent / part) for part in (f"{train}-{name}", "merged-source")
        )
        original = read_tensors(base)
        for module in results[train].modules:
            key = f"{module.path}.weight"
            update = float((exact[key].double() - original[key].double()).norm())
            expected = float((merged[key].double() - exact[key].double()).norm()) / update
            # Both merges round to float32, by 6e-8 of a weight each; the update is about a third of it.
            assert getattr(module, error) == pytest.approx(expected, abs=1e-6)


def test_what_is_recorded(results, closed_form):
    result = results["scalars"]
    record, before = read_record(result.out), read_record(closed_form)
    assert {name: record[name] for name in ("base", "source", "options")} == {
        name: before[name] for name in ("base", "source", "options")
    }
    entry = record["calibration"]
    assert (entry["objective"], entry["train"], entry["steps"], entry["seed"]) == ("distill", "scalars", 12, 0)
    assert entry["best_step"] == result.report.best_step > 0
    assert entry["models"]["calibrated"]["kl"] == result.models["calibrated"].kl
    assert entry["data"]["train"].startswith("sha256:")
    assert len(entry["history"]) == 7  # the closed form, then every second step
    assert [step for step, _ in entry["update_sizes"]] == [step for step, _ in entry["history"]]
    assert str(closed_form) not in json.dumps(entry)
    for new, old in zip(record["modules"], before["modules"], strict=True):
        assert (new["alpha_before"], new["beta_before"], new["error_before"]) == (
            old["alpha"],
            old["beta"],
            old["error"],
        )
        assert new["base_tensor"] == old["base_tensor"]
    assert read_adapter(result.out).map_modules == result.modules
    card = (result.out / "README.md").read_text()
    assert "## Calibration" in card
    assert "trained α and β (28 numbers)" in card
    assert "## Calibration" not in (closed_form / "README.md").read_text()


def test_the_same_run_writes_the_same_bytes(results, calibrated, tmp_path):
    calibrated(steps=12)
    for name in (*WEIGHTS, "map_config.json", "README.md"):
        assert filecmp.cmp(tmp_path / "out" / name, results["scalars"].out / name, shallow=False), name


@pytest.mark.parametrize(
    ("rate", "said"), [(1e3, "the held-out loss went from"), (1e30, "the loss of step 2 is nan")], ids=["worse", "nan"]
)
def test_never_worse(rate, said, calibrated, closed_form, tmp_path):
    result = calibrated(learning_rate=rate, steps=10)
    assert any(said in note for note in result.report.notes), result.report.notes
    assert result.report.best_step == 0
    assert result.models["calibrated"] == result.models["closed form"]
    for name in WEIGHTS:
        assert filecmp.cmp(tmp_path / "out" / name, closed_form / name, shallow=False), name
    old = read_adapter(closed_form).map_modules
    assert [(m.alpha, m.beta) for m in result.modules] == [(m.alpha, m.beta) for m in old]


def test_an_exact_adapter_has_nothing_to_gain(lora, text, tmp_path):
    mapconv.upgrade(lora, tmp_path / "map")
    result = mapconv.calibrate(tmp_path / "map", against=lora, data=text, out=tmp_path / "out", steps=9, **SETTINGS)
    assert result.report.steps == 0
    assert any("the closed form is the source already" in note for note in result.report.notes)
    assert filecmp.cmp(tmp_path / "out" / WEIGHTS[0], tmp_path / "map" / WEIGHTS[0], shallow=False)


def test_rounding_that_undoes_the_gain_keeps_the_closed_form(calibrated, closed_form, monkeypatch, tmp_path):
    """The numbers that decide are those of the bytes: here saving spoils them."""
    from mapconv.training import calibration

    def spoil(model, path, **settings):
        copy(closed_form, path)
        modules = read_record(path)["modules"]
        for entry in modules:
            entry["beta"] *= 2
        edit_json(path / "map_config.json", modules=modules)

    monkeypatch.setattr(calibration, "save_adapter", spoil)
    result = calibrated(steps=3)
    assert result.report.best_step == 0
    assert any("rounding" in note for note in result.report.notes)
    assert filecmp.cmp(tmp_path / "out" / WEIGHTS[0], closed_form / WEIGHTS[0], shallow=False)


def test_in_place_needs_force_and_keeps_what_lies_there(source, closed_form, text, tmp_path):
    own = copy(closed_form, tmp_path / "own")
    (own / "NOTES.txt").write_text("mine")
    (own / "verify.json").write_text("{}")
    settings = {"against": source, "data": text, "out": own, "steps": 2, **SETTINGS}
    with pytest.raises(mapconv.MapconvError, match="exists already"):
        mapconv.calibrate(own, **settings)
    first = mapconv.calibrate(own, force=True, **settings)
    assert (own / "NOTES.txt").read_text() == "mine"
    assert not (own / "verify.json").exists()  # it was measured on other weights
    again = mapconv.calibrate(own, force=True, **settings)
    assert again.models["closed form"] == first.models["calibrated"]
    assert read_record(own)["calibration"]["earlier"]["models"]["calibrated"]["kl"] == first.models["calibrated"].kl
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_the_task_is_learned_from_its_own_tokens(calibrated):
    result = calibrated(objective="task", train="all", learning_rate=0.02, steps=12)
    assert result.models["calibrated"].loss < result.models["closed form"].loss - 0.01
    assert read_record(result.out)["calibration"]["objective"] == "task"


def test_the_dora_direction_trains_too(source, text, tmp_path):
    mapconv.upgrade(source, tmp_path / "map", direction="dora")
    settings = SETTINGS | {"objective": "task", "steps": 4, "out": tmp_path / "out"}
    result = mapconv.calibrate(tmp_path / "map", against=source, data=text, **settings)
    assert result.models["closed form"].kl <= 1e-8
    assert result.models["calibrated"].loss < result.models["closed form"].loss
