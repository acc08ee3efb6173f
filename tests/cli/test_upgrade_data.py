"""``mapconv upgrade --data``: closer outputs than the refit of weights alone, and every way that data can be wrong."""

from __future__ import annotations

import json

import pytest
import torch

import mapconv
from tests.cli.refusals import assert_refused, nothing_written
from tests.files import edit_tensors

TEXT = "the quick brown fox jumps over the lazy dog, and then (at 9:15) it jumps back!\n"
LENGTH = ["--sequence-length", 32, "--samples", 24]


def write_text(path, seed: int, size: int = 8000):
    """So many characters, each of which is a token, drawn from those of the sentence."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randint(0, len(TEXT) - 1, (size,), generator=draw).tolist()
    path.write_text("".join(TEXT[index] for index in order))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 3)


@pytest.fixture(scope="module")
def fitted(dora, text, tmp_path_factory):
    """The DoRA refitted by its inputs; tests must not write there."""
    out = tmp_path_factory.mktemp("fitted") / "map"
    return mapconv.upgrade(dora, out, data=text, sequence_length=32, samples=24).out


def test_the_outputs_come_closer_on_other_text_of_the_kind(fitted, dora, tmp_path):
    mapconv.upgrade(dora, tmp_path / "plain")
    other = write_text(tmp_path / "other.txt", 4)
    plain, seen = (mapconv.verify(folder, dora, data=other).kl for folder in (tmp_path / "plain", fitted))
    assert seen < 0.8 * plain


def test_the_table_and_the_record_say_what_was_seen_and_the_same_data_gives_the_same_bytes(
    fitted, run, dora, text, tmp_path
):
    result = run("upgrade", dora, "-o", tmp_path / "again", "--data", text, *LENGTH)
    for name in ("adapter_model.safetensors", "map_config.json", "adapter_config.json"):
        assert (fitted / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    config = json.loads((fitted / "map_config.json").read_text())
    assert config["options"]["statistics"] == "full"
    assert config["data"] == {"name": "text.txt", "sequences": 24, "tokens": 24 * 32} | {
        "fingerprint": config["data"]["fingerprint"]
    }
    down = [module for module in config["modules"] if module["path"].endswith("down_proj")]
    assert all(0 < module["output_error"] < module["error"] for module in down)
    row = next(line.split() for line in result.out.splitlines() if line.strip().startswith("down_proj"))
    assert row[-2] == f"{max(module['output_error'] for module in down):.4f}"
    assert str(text) not in json.dumps(config)


def test_the_gains_are_those_of_the_written_factors(fitted, run, base, dora):
    result = run("verify", fitted, "--against", dora, "--json")
    weights = {module["path"]: module["error"] for module in json.loads(result.out)["modules"]}
    for module in json.loads((fitted / "map_config.json").read_text())["modules"]:
        # PEFT merges in float32: its sums over 48 inputs and four ranks round that much of W, of which Δ is a third.
        assert weights[module["path"]] == pytest.approx(module["error"], abs=1e-5)


def test_a_tolerance_is_of_the_outputs(run, dora, text, tmp_path):
    result = run("upgrade", dora, "-o", tmp_path / "map", "--data", text, *LENGTH, "--tolerance", "0.2")
    assert result.status == 0, result.err
    modules = json.loads((tmp_path / "map" / "map_config.json").read_text())["modules"]
    assert all(module["output_error"] <= 0.2 for module in modules)
    assert any(module["error"] > 0.2 for module in modules)


def test_diagonal_statistics(run, dora, text, tmp_path, fitted):
    result = run("upgrade", dora, "-o", tmp_path / "map", "--data", text, *LENGTH, "--statistics", "diagonal")
    assert result.status == 0, result.err
    assert (tmp_path / "map" / "adapter_model.safetensors").read_bytes() != (
        fitted / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("words", [["--direction", "dora"], []])
def test_where_all_is_exact_data_changes_nothing_and_that_is_said(words, run, lora, dora, text, tmp_path):
    source = dora if words else lora
    result = run("upgrade", source, "-o", tmp_path / "map", "--data", text, *LENGTH, *words)
    assert result.status == 0
    assert "--data and --calibrate change nothing" in result.out + result.err


def test_a_lora_below_its_rank_is_fitted_too(run, lora, text, tmp_path):
    result = run("upgrade", lora, "-o", tmp_path / "map", "--data", text, *LENGTH, "--rank", 2)
    assert result.status == 0
    modules = json.loads((tmp_path / "map" / "map_config.json").read_text())["modules"]
    assert all(module["output_error"] < module["error"] for module in modules)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b"\xff\xfe\xff", "not UTF-8"),
        (b"abcdefgh" * 4, "--sequence-length 16"),
    ],
)
def test_data_that_cannot_be_used(content, said, run, dora, tmp_path):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with nothing_written(tmp_path):
        assert_refused(run("upgrade", dora, "-o", tmp_path / "map", "--data", tmp_path / "text", *LENGTH), said)


def test_sequences_longer_than_the_model_takes(run, dora, text, tmp_path):
    with nothing_written(tmp_path):
        words = ["--data", text, "--sequence-length", 600]
        assert_refused(run("upgrade", dora, "-o", tmp_path / "map", *words), "512 tokens at most", "600")


def test_a_base_without_a_tokenizer(run, own_base, dora, text, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own_base / name).unlink()
    with nothing_written(tmp_path):
        words = ["--base", own_base, "--data", text, *LENGTH]
        assert_refused(run("upgrade", dora, "-o", tmp_path / "map", *words), "tokenizer", own_base)


def test_calibration_follows_the_refit(run, dora, text, fitted, tmp_path):
    words = ["--data", text, *LENGTH, "--calibrate", 4]
    result = run("upgrade", dora, "-o", tmp_path / "map", *words)
    assert result.status == 0, result.err
    config = json.loads((tmp_path / "map" / "map_config.json").read_text())
    refit = json.loads((fitted / "map_config.json").read_text())
    assert config["calibration"]["steps"] == 4
    assert config["data"] == refit["data"]
    before = {module["path"]: module["error"] for module in refit["modules"]}
    assert {module["path"]: module["error_before"] for module in config["modules"]} == pytest.approx(before)
    models = config["calibration"]["models"]
    assert models["calibrated"]["kl"] <= models["closed form"]["kl"] < models["base"]["kl"]
    assert f"{models['closed form']['kl']:.4f}" in result.out
    assert "gave no input vectors" not in result.err
    mapconv.merge(tmp_path / "map", tmp_path / "merged")


def test_a_dry_run_reads_the_data_and_writes_nothing(run, dora, text, tmp_path):
    with nothing_written(tmp_path):
        words = ["--data", text, *LENGTH, "--calibrate", 4, "--dry-run"]
        result = run("upgrade", dora, "-o", tmp_path / "map", *words)
    assert result.status == 0, result.err
    assert "(DoRA) on" in result.out
    assert "would convert 14 modules" in result.out
    assert "24 sequences, 768 tokens" in result.out


def test_fewer_sequences_than_asked_for_are_said_once(run, dora, text, tmp_path):
    (tmp_path / "short.txt").write_text(text.read_text()[:320])
    result = run("upgrade", dora, "-o", tmp_path / "map", "--data", tmp_path / "short.txt", *LENGTH)
    said = result.out + result.err
    assert result.status == 0, result.err
    assert said.count("fewer than the 24 to run") == 1


def test_calibration_trains_what_lora_compatible_holds(run, dora, text, tmp_path):
    result = run("upgrade", dora, "-o", tmp_path / "map", "--data", text, "--calibrate", 4, "--lora-compatible")
    assert result.status == 2
    assert "--lora-compatible" in result.err


@pytest.mark.parametrize(
    "word", [["--samples", 4], ["--sequence-length", 8], ["--statistics", "full"], ["--calibrate", 4]]
)
def test_options_about_data_need_data(word, run, dora, tmp_path):
    result = run("upgrade", dora, "-o", tmp_path / "map", *word)
    assert result.status == 2
    assert f"{word[0]} requires --data" in result.err


def test_inputs_that_overflow_are_no_statistics(run, own_base, dora, text, tmp_path):
    def spoil(tensors) -> None:
        tensors["model.norm.weight"].fill_(1.0)
        tensors["model.layers.0.input_layernorm.weight"].fill_(3e38)

    edit_tensors(own_base / "model.safetensors", spoil)
    with nothing_written(tmp_path):
        words = ["--base", own_base, "--data", text, *LENGTH]
        assert_refused(run("upgrade", dora, "-o", tmp_path / "map", *words), "overflow")
