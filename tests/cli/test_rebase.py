"""``mapconv rebase`` and ``mapconv statistics``: closer on another base, on every path, and what they refuse."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

import mapconv
from mapconv.errors import BaseMismatchError, CheckpointError, FidelityError, PlacementError
from tests.cli.refusals import assert_refused, nothing_written
from tests.cli.test_upgrade_data import write_text
from tests.files import copy, edit_tensors
from tests.models import kl, load_adapted, log_probabilities, save_adapter, save_base

SIZES = {"samples": 24, "sequence_length": 48}


def rounded_copy(base, out):
    """The base with its linear weights rounded to 4 bits, a scale a row."""
    copy(base, out)

    def quantize(tensors):
        for name, weight in tensors.items():
            if name.endswith("proj.weight"):
                scale = weight.float().abs().amax(1, keepdim=True) / 7
                tensors[name] = ((weight / scale).round() * scale).to(weight.dtype).contiguous()

    edit_tensors(out / "model.safetensors", quantize)
    return out


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base, a small LoRA and a DoRA on it, and its rounded copy."""
    folder = tmp_path_factory.mktemp("rebase")
    base = save_base(folder / "base")
    save_adapter(base, folder / "lora", size=0.05)
    save_adapter(base, folder / "dora", size=0.05, use_dora=True)
    rounded_copy(base, folder / "rounded")
    write_text(folder / "text.txt", 3, 2400)
    return folder


def distance(bases, adapter, onto, source):
    """KL of an adapter on a base to the source on its own, by stock PEFT."""
    return kl(served(bases / "base", bases / source), log_probabilities(load_adapted(onto, adapter)))


@cache
def served(base, source):
    """The outputs of a source on its own base, neither of which tests write into."""
    return log_probabilities(load_adapted(base, source))


@pytest.fixture(scope="module")
def rebased(bases):
    """What a rebase of the LoRA and of the DoRA with data gives; tests must not write there."""

    @cache
    def call(source):
        options = {"base": bases / "base", "onto": bases / "rounded", "data": bases / "text.txt", "rank": 8, **SIZES}
        return mapconv.rebase(bases / source, bases / f"{source}-rebased", statistics="running", **options)

    return call


@pytest.mark.parametrize(("source", "share"), [("lora", 0.6), ("dora", 0.8)])
def test_it_comes_closer_than_the_source_as_it_is(bases, rebased, source, share):
    result = rebased(source)
    as_is = distance(bases, bases / source, bases / "rounded", source)
    assert distance(bases, result.out, bases / "rounded", source) < share * as_is
    assert result.plain_lora
    assert result.served.rebased.kl < result.served.as_is.kl < result.served.alone.kl
    assert not any("magnitude" in name for name in load_file(result.out / "adapter_model.safetensors"))


def test_inputs_serve_better_than_weights_alone(bases, rebased, tmp_path):
    options = {"base": bases / "base", "onto": bases / "rounded", "data": bases / "text.txt", "rank": 8, **SIZES}
    found = {"running": rebased("lora").served.rebased.kl}
    for statistics in ("source", "none"):
        out = tmp_path / statistics
        found[statistics] = mapconv.rebase(
            bases / "lora", out, statistics=statistics, keep_worse=True, **options
        ).served.rebased.kl
    assert max(found["running"], found["source"]) < 0.8 * found["none"]


def test_without_data_the_source_writes_its_own_and_equal_seeds_give_equal_bytes(bases, run, tmp_path):
    for name in ("one", "two"):
        result = run(
            "rebase", bases / "lora", "--base", bases / "base", "--onto", bases / "rounded", "-o", tmp_path / name,
            "--rank", 8, "--samples", 16, "--sequence-length", 32, "--seed", 7,
        )  # fmt: skip
        assert result.status == 0, result.err
    assert "closer to the source than the source as it is" in result.out
    assert "ε of weights is large where no low rank holds what the bases differ by" in result.out
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    record = json.loads((tmp_path / "one" / "map_config.json").read_text())
    assert record["data"] == {
        "name": "the source's own samples", "seed": 7, "sequences": 16, "tokens": 16 * 32,
    }  # fmt: skip
    assert record["base"]["name"] == str(bases / "rounded")
    assert record["rebase"]["from"]["name"] == str(bases / "base")
    errors = record["rebase"]["modules"]
    assert len(errors) == 14
    assert all(module["base_change"] > 0 and module["output_error_before"] > 0 for module in errors)


def test_statistics_once_serve_a_rebase_without_a_model(bases, run, tmp_path):
    made = run(
        "statistics", bases / "base", "--data", bases / "text.txt", "-o", tmp_path / "stats", "--samples", 24,
        "--sequence-length", 48,
    )  # fmt: skip
    assert made.status == 0, made.err
    assert "14 layers" in made.out
    result = run(
        "rebase", bases / "lora", "--base", bases / "base", "--onto", bases / "rounded", "-o", tmp_path / "out",
        "--rank", 8, "--statistics-from", tmp_path / "stats", "--data", bases / "text.txt",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert "closer to the source than the source as it is" in result.out  # measured on the data, not fitted to it
    as_is = distance(bases, bases / "lora", bases / "rounded", "lora")
    assert distance(bases, tmp_path / "out", bases / "rounded", "lora") < 0.8 * as_is


def test_few_inputs_and_unknown_ones_are_said(bases, tmp_path):
    mapconv.statistics(bases / "base", tmp_path / "stats", data=bases / "text.txt", samples=1, sequence_length=16)
    path = tmp_path / "stats" / "statistics.json"
    record = json.loads(path.read_text())
    del record["layers"]["model.layers.1.mlp.up_proj"]
    path.write_text(json.dumps(record))
    result = mapconv.rebase(
        bases / "lora", tmp_path / "out", base=bases / "base", onto=bases / "rounded",
        statistics_from=tmp_path / "stats",
    )  # fmt: skip
    notes = " ".join(result.notes)
    assert "no inputs are known of 1 module, refitted by the weights alone: model.layers.1.mlp.up_proj" in notes
    assert "16 tokens are fewer than the inputs of 13 modules" in notes


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["--data", "text.txt", "--statistics", "running"],
            ["24 sequences, 1,152 tokens", "side by side", "rank      4"],
        ),
        (["--statistics", "source", "--calibrate", 5], ["text that the source writes", "the source\n", "5 steps"]),
        (["--all-linear", "--rank", 8], ["of these  8 that the source leaves alone", "8 on average"]),
        (["--tolerance", 0.2], ["the smallest with ε ≤ 0.2; the source's is 4"]),
    ],
)
def test_a_dry_run_prints_the_plan(given, words, bases, run, tmp_path):
    source = "attention" if "--all-linear" in given else "lora"
    if source == "attention":
        save_adapter(bases / "base", bases / source, target_modules=["q_proj", "k_proj", "v_proj"])
    result = run(
        "rebase", bases / source, "--base", bases / "base", "--onto", bases / "rounded", "-o", tmp_path / "out",
        "--samples", 24, "--sequence-length", 48, "--dry-run",
        *(bases / each if each == "text.txt" else each for each in given),
    )  # fmt: skip
    assert result.status == 0, result.err
    for each in (*words, "would refit", "would write", "takes     roughly"):
        assert each in result.out
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_base_are_refused(bases, tmp_path):
    mapconv.statistics(bases / "rounded", tmp_path / "stats", data=bases / "text.txt", **SIZES)
    with pytest.raises(BaseMismatchError, match="was collected from another base"):
        mapconv.rebase(
            bases / "lora", tmp_path / "out", base=bases / "base", onto=bases / "rounded",
            statistics_from=tmp_path / "stats",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_statistics_with_missing_files_are_refused(bases, tmp_path):
    (tmp_path / "stats").mkdir()
    with pytest.raises(CheckpointError, match=r"has no statistics\.json"):
        mapconv.rebase(
            bases / "lora", tmp_path / "out", base=bases / "base", onto=bases / "rounded",
            statistics_from=tmp_path / "stats",
        )  # fmt: skip


def test_a_lora_on_an_equal_base_comes_back(bases, tmp_path):
    copy(bases / "base", tmp_path / "same")
    result = mapconv.rebase(
        bases / "lora", tmp_path / "out", base=bases / "base", onto=tmp_path / "same", data=bases / "text.txt", **SIZES
    )
    assert result.unchanged
    assert "nothing to rebase" in " ".join(result.notes)
    # Float32 factors of float32 products: what is left is rounding.
    assert result.worst_error < 1e-4
    assert distance(bases, tmp_path / "out", tmp_path / "same", "lora") < 1e-8


def test_a_result_that_would_be_worse_is_not_written(bases, tmp_path):
    options = {
        "base": bases / "base", "onto": bases / "rounded", "data": bases / "text.txt", "rank": 1, "statistics": "none",
    }  # fmt: skip
    with pytest.raises(FidelityError, match=r"is further from .* than the adapter as it is"):
        mapconv.rebase(bases / "lora", tmp_path / "out", **options, **SIZES)
    assert not (tmp_path / "out").exists()
    result = mapconv.rebase(bases / "lora", tmp_path / "out", keep_worse=True, **options, **SIZES)
    assert result.served.is_worse
    assert (tmp_path / "out" / "map_config.json").exists()


def test_a_base_of_other_shapes_is_refused_with_the_list(bases, run, tmp_path):
    from transformers import LlamaForCausalLM

    from tests.models import tiny_config

    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(intermediate_size=40)).save_pretrained(tmp_path / "other")
    with nothing_written(tmp_path):
        result = run(
            "rebase", bases / "lora", "--base", bases / "base", "--onto", tmp_path / "other", "-o", tmp_path / "out"
        )
    assert_refused(result, "gate_proj")


def test_a_map_adapter_is_refused_on_a_base_that_it_was_not_trained_on(bases, tmp_path):
    mapconv.upgrade(bases / "lora", tmp_path / "map", base=bases / "base")
    with pytest.raises(BaseMismatchError):
        mapconv.rebase(
            tmp_path / "map", tmp_path / "out", base=bases / "rounded", onto=bases / "base", statistics="none"
        )


def test_a_missing_layer_is_a_placement_error(bases, tmp_path):
    copy(bases / "rounded", tmp_path / "short")

    def drop(tensors):
        for name in [name for name in tensors if ".layers.1.self_attn.q_proj" in name]:
            del tensors[name]

    edit_tensors(tmp_path / "short" / "model.safetensors", drop)
    with pytest.raises(PlacementError, match="q_proj"):
        mapconv.rebase(
            bases / "lora", tmp_path / "out", base=bases / "base", onto=tmp_path / "short", statistics="none"
        )


def test_the_result_runs_on_the_other_base_alone(bases, rebased, tmp_path):
    out = rebased("lora").out
    mapconv.merge(out, tmp_path / "merged", base=bases / "rounded")
    with pytest.raises(BaseMismatchError):
        mapconv.merge(out, tmp_path / "wrong", base=bases / "base")
