"""``merge --quantized keep``: merged weights in the storage of their base, and all else as it was."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import mapconv
from mapconv.checkpoint.codecs import plain_view
from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.quantization import quantization_settings
from mapconv.checkpoint.reader import TensorReader
from tests.models import merged_by_peft, save_adapter
from tests.quantized import quantize, quantize_with_twin, save_plain

TEXT = "the cat sat on a mat, and the dog (a big one) ran to it: why? nobody knows.\n" * 200
#: One of each kind of store.
STORAGES = ["ct-int4", "gptq-order", "awq", "fp8-ragged", "ct-int8-group", "int8", "nf4-double", "ct-nvfp4"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_plain(tmp_path_factory.mktemp("keep") / "plain")


@pytest.fixture(scope="module")
def adapter(plain):
    """Of two module types, so that others stay."""
    return save_adapter(plain, plain.parent / "lora", target_modules=["q_proj", "down_proj"], use_dora=True)


def values_of(folder):
    """What the codes of a model stand for, in float32."""
    config = json.loads((folder / "config.json").read_text())
    with TensorReader() as reader:
        view = plain_view(read_checkpoint(folder), config, quantization_settings(folder, config), reader)
        return {name: reader.read(ref).float().clone() for name, ref in view.tensors.items()}


@pytest.mark.parametrize("storage", STORAGES)
def test_merged_weights_are_close_and_all_others_keep_their_bytes(storage, plain, adapter, tmp_path):
    base, twin = quantize_with_twin(plain, storage, tmp_path)
    result = mapconv.merge(adapter, tmp_path / "merged", base=base, quantized="keep")
    before, after = load_file(base / "model.safetensors"), load_file(result.out / "model.safetensors")
    assert list(before) == list(after)
    for name in before:
        assert (before[name].dtype, before[name].shape) == (after[name].dtype, after[name].shape)
        if "q_proj" not in name and "down_proj" not in name:
            assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, result.out)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    found, exact, stored = values_of(result.out), merged_by_peft(twin, adapter), values_of(base)
    assert len(result.merged) == 4
    for item in result.merged:
        wanted, start = exact[item.tensor], stored[item.tensor].double()
        square = float((wanted - start).square().sum())
        error = float((found[item.tensor].double() - wanted).square().sum()) / square
        assert item.survival.error == pytest.approx(error**0.5, rel=1e-3)
        inner = float(((found[item.tensor].double() - start) * (wanted - start)).sum()) / square
        assert item.survival.projection == pytest.approx(inner, abs=1e-3)
        assert item.dtype not in ("F32", "BF16")


def test_feedback_brings_the_outputs_closer(plain, tmp_path):
    lora = save_adapter(plain, tmp_path / "lora", size=0.05)
    base, _ = quantize_with_twin(plain, "ct-int4", tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    fed = {"rounding": "feedback", "data": tmp_path / "text.txt", "samples": 8}
    kl = []
    for name, settings in (("near", {}), ("fed", fed)):
        out = mapconv.merge(lora, tmp_path / name, base=base, quantized="keep", **settings).out
        kl.append(mapconv.verify(out, lora, base=base, data=tmp_path / "text.txt").kl)
    assert kl[1] < 0.7 * kl[0]


def test_kept_scales_keep_their_bytes(plain, adapter, tmp_path):
    base = quantize(plain, "ct-int4", tmp_path)
    result = mapconv.merge(adapter, tmp_path / "merged", base=base, quantized="keep", scales="keep")
    before, after = load_file(base / "model.safetensors"), load_file(result.out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"weight_packed"}
    record = json.loads((result.out / "map_merge.json").read_text())
    assert record["quantized"] == {"kept": 4, "scales": "keep", "lifted": []}


@pytest.mark.parametrize(
    ("storage", "place"),
    [
        ("ct-int4", lambda settings: settings["ignore"]),
        ("fp8-blocks", lambda settings: settings["modules_to_not_convert"]),
        ("nf4", lambda settings: settings["llm_int8_skip_modules"]),
        ("gptq-4", lambda settings: list(settings["dynamic"])),
    ],
)
def test_lifted_modules_are_plain_and_the_configuration_says_so(storage, place, plain, adapter, tmp_path):
    base, twin = quantize_with_twin(plain, storage, tmp_path)
    settings = {"quantized": "keep", "lift": "layers.0.self_attn.q_proj"}
    result = mapconv.merge(adapter, tmp_path / "merged", base=base, **settings)
    name = "model.layers.0.self_attn.q_proj.weight"
    stored, exact = load_file(result.out / "model.safetensors"), merged_by_peft(twin, adapter)
    assert stored[name].dtype == torch.bfloat16
    assert torch.equal(stored[name], exact[name].bfloat16())
    assert not [other for other in stored if "layers.0.self_attn.q_proj" in other and other != name]
    listed = place(json.loads((result.out / "config.json").read_text())["quantization_config"])
    assert any("layers" in entry and entry.endswith(("q_proj", "q_proj$")) for entry in listed)
    assert set(values_of(result.out)) == set(values_of(base))


def test_modules_that_would_lose_too_much_are_lifted(plain, tmp_path):
    base = quantize(plain, "ct-int4", tmp_path)
    weak = save_adapter(plain, tmp_path / "weak", size=0.01, target_modules=["q_proj", "down_proj"])
    settings = {"quantized": "keep", "scales": "keep"}
    lost = mapconv.merge(weak, tmp_path / "lost", base=base, **settings)
    assert min(item.survival.projection for item in lost.merged) < 0.5
    kept = mapconv.merge(weak, tmp_path / "kept", base=base, min_survival=0.9, **settings)
    assert min(item.survival.projection for item in kept.merged) >= 0.9
    assert any("left the codes for 16 bits" in note for note in kept.notes)


def test_values_beyond_kept_scales_are_counted_and_said(plain, tmp_path, run):
    strong = save_adapter(plain, tmp_path / "strong", size=1.0)
    base = quantize(plain, "ct-int4", tmp_path)
    done = run("merge", strong, "--base", base, "-o", tmp_path / "m", "--quantized", "keep", "--scales", "keep")
    assert done.status == 0, done.err
    assert "lie beyond the largest that compressed-tensors int4 reaches" in done.err


def test_a_kept_model_is_a_base_again_and_pushes(plain, adapter, tmp_path, run):
    base = quantize(plain, "nf4", tmp_path)
    first = mapconv.merge(adapter, tmp_path / "first", base=base, quantized="keep")
    again = mapconv.merge(adapter, tmp_path / "again", base=first.out, quantized="keep", dry_run=True)
    assert [item.tensor for item in again.merged] == [item.tensor for item in first.merged]
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("storage", "words", "status", "said"),
    [
        (None, ["--quantized", "keep"], 1, "is not quantized"),
        ("mlx-4", ["--quantized", "keep"], 1, "cannot be written in these codes"),
        ("ct-int4", ["--quantized", "keep", "--dtype", "float16"], 2, "keep their dtype"),
        ("ct-int4", ["--scales", "keep"], 2, "requires --quantized keep"),
        ("ct-int4", ["--quantized", "keep", "--rounding", "feedback"], 2, "requires --data"),
        ("ct-int4", ["--quantized", "keep", "--lift", "v_proj"], 1, "names no weight in codes that the adapter"),
        ("ct-int4", ["--min-survival", "0.5"], 2, "requires --quantized keep"),
    ],
)
def test_refusals(storage, words, status, said, plain, adapter, tmp_path, run):
    base = plain if storage is None else quantize(plain, storage, tmp_path)
    done = run("merge", adapter, "--base", base, "-o", tmp_path / "out", *words)
    assert (done.status, said in done.err) == (status, True), done.err
    assert not (tmp_path / "out").exists()


def test_transformers_loads_what_compressed_tensors_reads(plain, adapter, tmp_path):
    compressed = pytest.importorskip("compressed_tensors", reason="the owner of this storage")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    assert compressed
    base = quantize(plain, "ct-int4", tmp_path)
    out = mapconv.merge(adapter, tmp_path / "merged", base=base, quantized="keep").out
    tensors = load_file(out / "model.safetensors")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme.model_validate(settings["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, value in values_of(out).items():
        path = name.removesuffix(".weight")
        if f"{path}.weight_packed" in tensors:
            parts = {part.rpartition(".")[2]: tensors[part] for part in tensors if part.startswith(f"{path}.weight_")}
            parts["weight_scale"] = parts["weight_scale"].float()
            theirs = compressor.decompress(parts, scheme)
            torch.testing.assert_close(theirs["weight"].float(), value)


def test_bitsandbytes_reads_what_is_written(plain, adapter, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional", reason="the owner of this storage")
    base = quantize(plain, "nf4-double", tmp_path)
    out = mapconv.merge(adapter, tmp_path / "merged", base=base, quantized="keep").out
    tensors, values = load_file(out / "model.safetensors"), values_of(out)
    name = "model.layers.1.mlp.down_proj.weight"
    parts = {part.removeprefix(f"{name}."): tensors[part] for part in tensors if part.startswith(f"{name}.")}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    state.dtype = torch.float32
    codes = tensors[name].reshape(1, -1) if tensors[name].ndim == 1 else tensors[name]
    theirs = functional.dequantize_4bit(codes, state)
    torch.testing.assert_close(theirs.view(values[name].shape), values[name])
    shutil.rmtree(out)
