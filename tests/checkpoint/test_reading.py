"""Adapter files on disk: order, key spellings, shapes; and hostile module names."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import MapconvError
from mapconv.formats import read_adapter
from tests.files import edit_json, edit_tensors, read_tensors


def test_modules_come_in_the_order_of_the_model(lora):
    paths = [module.path for module in read_adapter(lora).modules]
    assert len(paths) == 14
    assert [path.split(".")[2] for path in paths] == ["0"] * 7 + ["1"] * 7


def test_an_adapter_records_what_its_files_say(dora, base):
    adapter = read_adapter(dora)
    tensors = load_file(dora / "adapter_model.safetensors")
    assert adapter.method == "DoRA"
    assert adapter.base == str(base)
    assert adapter.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert adapter.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for module in adapter.modules:
        key = f"base_model.model.{module.path}"
        assert module.scaling == 2.0
        assert module.rank == 4
        assert module.weight_shape == (
            tensors[f"{key}.lora_B.weight"].shape[0],
            tensors[f"{key}.lora_A.weight"].shape[1],
        )


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_keys_that_keep_the_adapters_name(method, request, tmp_path, base):
    """Third-party writers leave ``.default`` in."""
    source = request.getfixturevalue(method)
    mapconv.merge(source, tmp_path / "expected")
    own = request.getfixturevalue(f"own_{method}")

    def rename(tensors):
        for name in list(tensors):
            stem = name.removesuffix(".weight")
            tensors[f"{stem}.default{name.removeprefix(stem)}"] = tensors.pop(name)

    edit_tensors(own / "adapter_model.safetensors", rename)
    assert any(".default" in name for name in load_file(own / "adapter_model.safetensors"))
    mapconv.merge(own, tmp_path / "merged")
    expected, merged = read_tensors(tmp_path / "expected"), read_tensors(tmp_path / "merged")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_keys_without_pefts_prefix(own_lora, lora):
    edit_tensors(
        own_lora / "adapter_model.safetensors",
        lambda tensors: [tensors.update({n.removeprefix("base_model.model."): tensors.pop(n)}) for n in list(tensors)],
    )
    paths = [[module.path for module in read_adapter(folder).modules] for folder in (own_lora, lora)]
    assert paths[0] == paths[1]


@pytest.mark.parametrize(
    "path", ["²", "layers.²", "layers." + "9" * 5000, "٣", "", ".", "a b\n", "\x1b[31m", "layers.0.x" * 300]
)
def test_hostile_module_names(path, tmp_path):
    """A name is only a name: it is read, or refused with an error of ours."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 3), f"{path}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    try:
        modules, refusal = mapconv.inspect(tmp_path).modules, None
    except MapconvError as error:
        modules, refusal = None, str(error)
    assert modules == 1 or "adapter_model.safetensors" in refusal


def test_the_rank_is_the_tensors_own_where_a_pattern_says_so(own_lora):
    edit_json(own_lora / "adapter_config.json", r=9, rank_pattern={".*": 4}, alpha_pattern={".*q_proj": 12})
    scalings = {module.module_type: module.scaling for module in read_adapter(own_lora).modules}
    assert scalings["q_proj"] == 3.0
    assert scalings["v_proj"] == 2.0


def test_the_pickle_is_not_read_where_safetensors_lie_beside_it(own_lora):
    (own_lora / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert len(read_adapter(own_lora).modules) == 14
