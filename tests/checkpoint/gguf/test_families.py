"""Models of every family whose GGUF is read: the weights, and a configuration under which they compute the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from mapconv.checkpoint.gguf.positions import llama3_factors
from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.reader import TensorReader
from mapconv.errors import CheckpointError, UnsupportedError
from mapconv.placement.bases import plain_base
from tests.files import read_tensors
from tests.gguf_files import NAMES, floats, gguf_name, save_gguf, settings_of, write_gguf

_SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 512, "initializer_range": 0.18,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
_SHORT, _LONG = [1.0, 1.1, 1.3, 2.0], [1.0, 2.0, 4.0, 9.0]
#: (class, architecture, what the configuration has besides, metadata besides, tensors besides)
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]] = {
    "llama": ("Llama", "llama", {"tie_word_embeddings": True}, {"rope.dimension_count": 8}, {}),
    "llama-biases": ("Llama", "llama", {"attention_bias": True, "mlp_bias": True}, {"rope.dimension_count": 8}, {}),
    "llama-3": (
        "Llama", "llama", {"rope_parameters": _LLAMA3}, {"rope.freq_base": 500_000.0, "rope.dimension_count": 8},
        {"rope_freqs.weight": torch.tensor(llama3_factors(500_000.0, 8, 8.0))},
    ),
    "llama-linear": (
        "Llama", "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {},
    ),
    "mixtral": (
        "Mixtral", "llama", {"num_local_experts": 3, **_EXPERTS, "sliding_window": None},
        {"expert_count": 3, "expert_used_count": 2, "rope.freq_base": 1_000_000.0}, {},
    ),
    "qwen2": ("Qwen2", "qwen2", {}, {"rope.freq_base": 10_000.0}, {}),
    "qwen2-yarn": (
        "Qwen2", "qwen2",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}, {},
    ),
    # Heads of 128, for transformers reads no other number.
    "qwen3": ("Qwen3", "qwen3", {"head_dim": 128}, {}, {}),
    "qwen3moe": (
        "Qwen3Moe", "qwen3moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 16,
         **_EXPERTS},
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}, {},
    ),
    "gemma": ("Gemma", "gemma", {"head_dim": 16}, {}, {}),
    "gemma2": (
        "Gemma2", "gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
        {"attention.sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, {},
    ),
    "gemma3": (
        "Gemma3", "gemma3", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7},
        {"attention.sliding_window": 8, "rope.freq_base": 1_000_000.0}, {},
    ),
    "phi3": ("Phi3", "phi3", {"sliding_window": 8}, {"attention.sliding_window": 8, "rope.dimension_count": 8}, {}),
    "phi3-long": (
        "Phi3", "phi3",
        {"original_max_position_embeddings": 128, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": _SHORT, "long_factor": _LONG,
            "original_max_position_embeddings": 128}},
        {"rope.scaling.original_context_length": 128, "rope.dimension_count": 8},
        {"rope_factors_long.weight": torch.tensor(_LONG), "rope_factors_short.weight": torch.tensor(_SHORT)},
    ),
}  # fmt: skip


def make(case: str, folder: Path) -> tuple[Any, Path, dict[str, torch.Tensor]]:
    """(the model, its GGUF file, the values that the file holds by transformers' names)."""
    class_name, architecture, changes, metadata, extra = CASES[case]
    name = f"{class_name}TextConfig" if class_name == "Gemma3" else f"{class_name}Config"
    torch.manual_seed(0)
    model = getattr(transformers, f"{class_name}ForCausalLM")(getattr(transformers, name)(**_SIZES | changes))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases begin as ones and zeros, which hide what is done to them
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "model")
    settings = {f"{architecture}.{key}": value for key, value in metadata.items()}
    values = save_gguf(folder / "model", folder / "model.gguf", architecture, quantized=False, extra=extra, **settings)
    return model.eval(), folder / "model.gguf", values


def read_values(file: Path) -> dict[str, torch.Tensor]:
    checkpoint, _ = plain_base(read_checkpoint(file))
    with TensorReader() as reader:
        return {name: reader.read(ref) for name, ref in checkpoint.tensors.items()}


@torch.inference_mode()
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_the_same(case, tmp_path):
    model, file, values = make(case, tmp_path)
    found = read_values(file)
    assert found.keys() == values.keys()
    # One was added to the norms of a Gemma, and taken away: a rounding of float32 each.
    assert all(torch.allclose(found[name], value, rtol=0, atol=2**-23) for name, value in values.items())
    exact = [name for name in values if not (case.startswith("gemma") and "norm" in name)]
    assert all(torch.equal(found[name], values[name]) for name in exact)

    _, config = plain_base(read_checkpoint(file))
    assert config["architectures"] == [type(model).__name__]
    settings = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    restored = type(model)(transformers.AutoConfig.for_model(config["model_type"], **settings)).eval()
    restored.load_state_dict(model.state_dict())
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(restored(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_transformers_reads_the_same(case, tmp_path):
    """Of the others it takes some settings for those of the best-known model, or knows no names."""
    pytest.importorskip("gguf")
    model, file, _ = make(case, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(loaded[name], tensor, rtol=0, atol=2**-23), name


@pytest.mark.parametrize("architecture", NAMES)
def test_names_are_those_of_the_library(architecture, tmp_path):
    gguf = pytest.importorskip("gguf")
    case = next(case for case, (_, found, *_) in CASES.items() if found == architecture)
    _, _, values = make(case, tmp_path)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, 8)
    for name in values:
        path, _, kind = re.sub(r"\.experts\.\d+\.", ".experts.", name).rpartition(".")
        assert gguf_name(architecture, name) == f"{table.get_name(path)}.{kind}"


def test_of_16_bits_the_more_frequent(tmp_path):
    config = _SIZES | {"rms_norm_eps": 1e-5}
    weight = torch.ones(64, 32)
    halves = ((64, 32), 1, weight.half().numpy().tobytes())
    file = write_gguf(
        tmp_path / "a.gguf",
        settings_of("llama", config),
        {"token_embd.weight": halves, "output.weight": floats(weight)},
    )
    checkpoint, found = plain_base(read_checkpoint(file))
    assert found["dtype"] == "float16"
    assert {ref.dtype for ref in checkpoint.tensors.values()} == {"F16"}


class TestRefused:
    """What a file says that no class of transformers, or none that is known here, can be told."""

    def error(self, tmp_path, settings=(), tensors=(), kind=UnsupportedError) -> str:
        config = _SIZES | {"rms_norm_eps": 1e-5}
        table = {"token_embd.weight": floats(torch.ones(64, 32))} | dict(tensors)
        file = write_gguf(tmp_path / "model.gguf", settings_of("llama", config) | dict(settings), table)
        with pytest.raises(kind) as caught:
            plain_base(read_checkpoint(file))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_architecture(self, tmp_path):
        message = self.error(tmp_path, {"general.architecture": "mamba"})
        assert "'mamba'" in message
        assert "qwen3moe" in message

    def test_tensor(self, tmp_path):
        assert "blk.0.ssm_a.weight" in self.error(tmp_path, tensors={"blk.0.ssm_a.weight": floats(torch.ones(32))})

    def test_adapter(self, tmp_path):
        assert "'adapter'" in self.error(tmp_path, {"general.type": "adapter"}, kind=CheckpointError)

    def test_position_scaling(self, tmp_path):
        assert "'warp'" in self.error(tmp_path, {"llama.rope.scaling.type": "warp"})

    def test_frequencies_of_nobody(self, tmp_path):
        message = self.error(tmp_path, tensors={"rope_freqs.weight": floats(torch.tensor([1.0, 2.0, 3.0, 8.0]))})
        assert "rope_freqs.weight" in message

    def test_heads_of_another_number_in_each_layer(self, tmp_path):
        message = self.error(tmp_path, {"llama.attention.head_count_kv": [2, 1]}, kind=CheckpointError)
        assert "head_count_kv" in message

    def test_some_biases(self, tmp_path):
        assert "biases" in self.error(tmp_path, tensors={"blk.0.attn_q.bias": floats(torch.ones(32))})

    @pytest.mark.parametrize("key", ["embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon"])
    def test_missing_setting(self, key, tmp_path):
        config = _SIZES | {"rms_norm_eps": 1e-5}
        settings = settings_of("llama", config)
        del settings[f"llama.{key}"]
        file = write_gguf(tmp_path / "model.gguf", settings, {"token_embd.weight": floats(torch.ones(64, 32))})
        with pytest.raises(CheckpointError, match=key):
            plain_base(read_checkpoint(file))


def test_the_configuration_beside_the_file_is_used(tmp_path):
    """If it is that of the same model: a folder may hold many files."""
    _, file, _ = make("llama", tmp_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for changes, used in [({}, True), ({"num_hidden_layers": 3}, False), ({"model_type": "qwen2"}, False)]:
        (tmp_path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.25} | changes))
        _, found = plain_base(read_checkpoint(file))
        assert (found.get("attention_dropout") == 0.25) is used
    assert read_tensors(tmp_path / "model")
