"""Code that a model's folder brings or names never runs, and nobody is asked whether it should."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest

from mapconv.errors import CheckpointError
from mapconv.runtime.models import load_model, model_class
from tests.files import edit_json


@pytest.fixture
def evil_base(own_base: Path, tmp_path: Path, monkeypatch) -> Path:
    """A base with Python of its own under all the names that transformers looks for; its mark is ``ran``."""
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (own_base / f"{name}.py").write_text(
            f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
            "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
            "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
            "class EvilForCausalLM(LlamaForCausalLM):\n    config_class = EvilConfig\n"
            "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
        )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def asked(prompt: str = "") -> str:
        (tmp_path / "asked").touch()
        return "y"

    monkeypatch.setattr(builtins, "input", asked)
    return own_base


def assert_nothing_ran(folder: Path) -> None:
    assert not (folder / "ran").exists()
    assert not (folder / "asked").exists()


def test_a_tokenizer_of_its_own_code_is_refused(evil_base, lora, dora, tmp_path, run):
    edit_json(
        evil_base / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]},
    )
    for command in (
        ("verify", dora, "--against", lora, "--base", evil_base),
        ("upgrade", lora, "-o", tmp_path / "out", "--base", evil_base, "--rank", "2", "--data", __file__),
    ):
        done = run(*command)
        assert_nothing_ran(tmp_path)
        if done.status:
            assert "needs Python code of its own, which mapconv never runs" in done.err


def test_a_model_of_its_own_code_is_refused(evil_base, lora, dora, tmp_path, run):
    edit_json(
        evil_base / "config.json",
        model_type="evil",
        architectures=["EvilForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_evil.EvilConfig",
            "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
        },
    )
    done = run("verify", dora, "--against", lora, "--base", evil_base)
    assert_nothing_ran(tmp_path)
    assert done.status == 1
    assert "needs Python code of its own, which mapconv never runs" in done.err
    # What needs no model but its weights' names and shapes works.
    assert run("merge", lora, "-o", tmp_path / "out", "--base", evil_base).status == 0
    assert_nothing_ran(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"attn_implementation": "stranger/kernel"},
        {"_attn_implementation": "stranger/kernel:flash"},
        {"experts_implementation": {"": "stranger/kernel"}},
        {"text_config": {"attn_implementation": "stranger/kernel"}},
    ],
)
def test_kernels_on_the_hub_are_refused(own_base, setting):
    edit_json(own_base / "config.json", **setting)
    with pytest.raises(CheckpointError, match="names code on the Hub"):
        load_model(own_base, dtype="float32", device="cpu")


def test_an_adapter_beside_the_model_is_not_attached_in_silence(own_base, lora):
    for path in lora.glob("adapter_*"):
        (own_base / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="holds an adapter beside the model"):
        load_model(own_base, dtype="float32", device="cpu")


@pytest.mark.parametrize("name", ["pipeline", "Trainer", "AutoModel", "NoSuchClass", "logging", "__name__"])
def test_only_a_models_class_is_a_models_class(name):
    with pytest.raises(CheckpointError, match=f"no model class {name}"):
        model_class(name)
