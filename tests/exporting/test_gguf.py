"""GGUF files of adapters, beside the gguf package and what llama.cpp's converter does to a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mapconv
from mapconv.exporting.ggufnames import ARCHITECTURES, gguf_name
from tests.cli.refusals import assert_refused, nothing_written
from tests.files import edit_json
from tests.models import load_base, merged_by_peft, save_adapter


def gguf_update(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return tensors[f"{name}.lora_b"].double() @ tensors[f"{name}.lora_a"].double()


def read_gguf(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors},
    )


def as_converted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp's converter of models stores them (``LlamaModel.permute``)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("source", ["lora", "uneven"])
def test_gguf_changes_the_converted_base_as_the_source_changes_its_own(source, base, tmp_path, request):
    adapter = request.getfixturevalue(source)
    mapconv.export(adapter, tmp_path / "out.gguf", server="llama.cpp")
    fields, tensors = read_gguf(tmp_path / "out.gguf")
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == "llama"
    # The reader divides alpha by each tensor's own rank, and takes 0 for a scale of 1.
    assert fields["adapter.lora.alpha"] == (4.0 if source == "lora" else 0.0)
    W, T = load_base(base).state_dict(), merged_by_peft(base, adapter)
    config = json.loads((base / "config.json").read_text())
    changed = 0
    for name, weight in T.items():
        path = gguf_name(name.removesuffix(".weight"), config)
        if path is None or f"{path}.lora_a" not in tensors:
            torch.testing.assert_close(weight, W[name].double())
            continue
        wanted = weight - W[name].double()
        if "q_proj" in name or "k_proj" in name:
            wanted = as_converted(wanted, 4 if "q_proj" in name else 2)
        torch.testing.assert_close(gguf_update(tensors, path), wanted, rtol=0, atol=1e-6)
        changed += 1
    assert 2 * changed == len(tensors)


def test_gguf_combines_as_the_adapter_that_it_is(base, lora, tmp_path):
    """Its rows of q and k are in llama.cpp's order, which only the base's heads tell."""
    mapconv.export(lora, tmp_path / "own.gguf", to="gguf")
    mapconv.combine([tmp_path / "own.gguf", lora], tmp_path / "out", base=base, weights=[0.25, 0.75])
    got, wanted = merged_by_peft(base, tmp_path / "out"), merged_by_peft(base, lora)
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=2e-6)


def test_gguf_of_embeddings_is_read_by_tokens(base, models, tmp_path):
    source = save_adapter(base, models / "embedded", target_modules=["embed_tokens", "q_proj"])
    mapconv.export(source, tmp_path / "out.gguf", to="gguf")
    _, tensors = read_gguf(tmp_path / "out.gguf")
    A, B = tensors["token_embd.weight.lora_a"], tensors["token_embd.weight.lora_b"]
    name = "model.embed_tokens.weight"
    wanted = merged_by_peft(base, source)[name] - load_base(base).state_dict()[name].double()
    torch.testing.assert_close(A.double() @ B.double().T, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gguf_in_half_precision(dtype, base, lora, tmp_path):
    result = mapconv.export(lora, tmp_path / "out.gguf", to="gguf", dtype=dtype)
    assert 0 < result.worst_error < 0.01
    gguf = pytest.importorskip("gguf")
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds == {"F16" if dtype == "float16" else "BF16"}


def test_gguf_names_are_those_of_its_own_table():
    gguf = pytest.importorskip("gguf")
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    own = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    for kind, (architecture, _) in ARCHITECTURES.items():
        table = gguf.get_tensor_name_map(numbers[architecture], 3)
        for path in [*(f"model.layers.2.{name}" for name in own), "model.embed_tokens", "lm_head"]:
            mapped = table.get_name(path)
            if mapped is not None:
                assert gguf_name(path, {"model_type": kind}) == f"{mapped}.weight", (kind, path)
    assert gguf_name("lm_head", {"model_type": "llama", "tie_word_embeddings": True}) is None


def test_a_number_of_heads_that_the_rows_do_not_have(run, lora, own_base, tmp_path):
    edit_json(own_base / "config.json", num_attention_heads=5)
    with nothing_written(tmp_path / "base"):
        result = run("export", lora, "--to", "gguf", "-o", tmp_path / "x.gguf", "--base", own_base)
    assert_refused(result, "config.json says 5 attention heads")
    assert not (tmp_path / "x.gguf").exists()
