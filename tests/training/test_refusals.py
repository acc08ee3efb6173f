"""What calibrate refuses: one sentence, exit 1 or 2, and nothing written."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

import mapconv
from mapconv.errors import UnsupportedError
from mapconv.placement.adapters import place_adapter
from mapconv.placement.skeleton import read_model_config
from mapconv.training.models import target_classes
from tests.cli.refusals import assert_refused, nothing_written
from tests.files import copy


@pytest.fixture
def refuse(run, command_line, tmp_path):
    def command(*words, instead=None):
        first = list(command_line)
        for old, new in (instead or {}).items():
            first[first.index(old) + 1] = str(new)
        with nothing_written(tmp_path):
            return run(*first, "-o", tmp_path / "out", *words)

    return command


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "0"],
        ["--train", "some"],
        ["--objective", "other"],
        ["--lr", "0"],
        ["--batch-size", "0"],
        ["--sequence-length", "1"],
        ["--held-out", "0"],
        ["--device", "tpu"],
        ["--seed", "-1"],
    ],
)
def test_wrong_usage(words, run):
    result = run("calibrate", "map", "--against", "source", "--data", "data", *words)
    assert result.status == 2
    assert words[0] in result.err


def test_adapters_that_do_not_belong_together(refuse, lora, dora, closed_form, source):
    other = f"was made from another adapter than {dora}"
    assert_refused(refuse(instead={"--against": dora}), other, "--force")
    assert_refused(refuse(instead={"--against": closed_form}), "is a MAP adapter: --against takes the LoRA or DoRA")
    assert_refused(
        refuse(instead={"calibrate": lora}), "is not a MAP adapter (LoRA): convert it with `mapconv upgrade` first"
    )


def test_another_source_with_force(run, command_line, dora, tmp_path):
    words = list(command_line)
    words[words.index("--against") + 1] = str(dora)
    result = run(*words, "-o", tmp_path / "out", "--force", "--steps", "1")
    assert result.status == 0
    assert f"accepted with --force: {words[1]}/map_config.json was made from another adapter than {dora}" in result.err


def test_another_base_with_force(run, command_line, other_base, tmp_path):
    result = run(*command_line, "-o", tmp_path / "out", "--force", "--steps", "1", "--base", other_base)
    assert result.status == 0
    assert re.search(r"accepted with --force: 14 weights of another base; \S+ has norm", result.err)


def test_sources_with_other_modules(refuse, base, closed_form, tmp_path):
    from tests.models import save_adapter

    few = save_adapter(base, tmp_path / "few", use_dora=True, target_modules=["q_proj"])
    assert_refused(refuse("--force", instead={"--against": few}), "adapt different modules")


def test_another_base(refuse, other_base):
    assert_refused(refuse("--base", other_base), "has norm", "made for a base")


def test_outputs_that_are_taken(refuse, closed_form, source, tmp_path):
    copy(closed_form, tmp_path / "out")
    assert_refused(refuse(), "exists already")
    assert_refused(refuse("-o", source, "--force"), "is, or holds, the input")


def test_sequences_longer_than_the_model_allows(refuse, text):
    assert_refused(refuse("--sequence-length", 513, "--held-out", 1), "--sequence-length")


def test_data_that_does_not_do(refuse, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    said = ["has 9 tokens", "one sequence of 32", "--sequence-length 4"]
    assert_refused(refuse(instead={"--data": tmp_path / "short.txt"}), *said)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input": "a", "label": 0}))
    assert_refused(refuse(instead={"--data": tmp_path / "rows.jsonl"}), "labelled texts, which are for a classifier")


def test_a_base_without_a_tokenizer(refuse, base, source, closed_form, tmp_path):
    own = copy(base, tmp_path / "base")
    for path in own.glob("tokenizer*"):
        path.unlink()
    assert_refused(refuse("--base", own), "the tokenizer in")


@pytest.mark.parametrize(
    ("class_name", "labels", "said"),
    [
        ("LlamaForTokenClassification", 2, "calibration trains causal language models and sequence classifiers"),
        ("LlamaModel", 2, "calibration trains causal language models and sequence classifiers"),
        ("LlamaForSequenceClassification", 1, "has one output and no classes"),
    ],
)
def test_models_that_calibration_cannot_compare(class_name, labels, said, source):
    target = place_adapter(source, None).target
    table = read_model_config(target.folder) | {"id2label": {str(n): str(n) for n in range(labels)}}
    with pytest.raises(UnsupportedError, match=said):
        target_classes(replace(target, class_name=class_name, source_config=table))


def test_cuda_where_there_is_none(refuse, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(refuse("--device", "cuda"), "torch sees no CUDA device")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_too_little_memory_names_the_knobs(error, refuse, monkeypatch):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr("mapconv.training.loop.Trainer._loss", fail)
    assert_refused(refuse(), "--batch-size", "--sequence-length")


@pytest.mark.parametrize("settings", [{"steps": 0}, {"learning_rate": -1.0}, {"held_out": 0}, {"batch_size": 0}])
def test_numbers_out_of_range_in_python(settings, closed_form, source, text):
    with pytest.raises(ValueError, match="expected"):
        mapconv.calibrate(closed_form, against=source, data=text, **settings)
