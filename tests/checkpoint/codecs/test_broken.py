"""Broken quantized weights: one error of ours that names the tensor, and no other; by hand, and by mutation."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mapconv.checkpoint.codecs import plain_view
from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.quantization import quantization_settings
from mapconv.checkpoint.reader import TensorReader, block_elements, row_ranges
from mapconv.errors import CheckpointError, MapconvError, UnsupportedError
from tests import examples

from .encoders import STORAGES, Tensors
from .test_values import NAME, weight_of

#: What a storage does without where it is absent.
OPTIONAL = ("weight_format", "g_idx", "weight_g_idx", "weight_zero_point")


def read_all(folder, config, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Every value that mapconv would merge: what it reads of each tensor, by rows."""
    stored = {f"{NAME}.{ending}": tensor.contiguous().clone() for ending, tensor in tensors.items()}
    save_file(stored | {"model.norm.weight": torch.ones(5)}, folder / "model.safetensors")
    values = {}
    with TensorReader() as reader:
        view = plain_view(read_checkpoint(folder), config, quantization_settings(folder, config), reader)
        for name, ref in view.tensors.items():
            buffer = torch.empty(8 * block_elements(ref), dtype=torch.uint8)
            parts = [reader.read_range(ref, *span, buffer).clone() for span in row_ranges(ref)]
            values[name] = torch.cat(parts) if parts else torch.empty(0)
    return values


def parts_of(name: str) -> tuple[dict, Tensors]:
    storage = STORAGES[name]
    return {storage.key: storage.settings}, storage.encode(weight_of((32, 64)))[0]


def is_float(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)


MISSING = [
    (name, ending)
    for name in STORAGES
    for ending in parts_of(name)[1]
    if ending not in OPTIONAL and not (name.startswith("mlx") and ending == "scales")
]
SCALES = [
    (name, ending)
    for name in STORAGES
    for ending, tensor in parts_of(name)[1].items()
    if is_float(tensor) and ending != "weight" and "quant_map" not in ending
]


#: Those that are all that their codes are multiplied by: a bias or an offset leaves something of a zero.
FACTORS = [(name, ending) for name, ending in SCALES if not name.startswith("mlx") and "nested" not in ending]


@pytest.mark.parametrize(("name", "ending"), MISSING)
def test_a_tensor_is_missing(name, ending, tmp_path):
    config, tensors = parts_of(name)
    del tensors[ending]
    with pytest.raises(MapconvError, match=rf"{NAME}|none of its tensors"):
        read_all(tmp_path, config, tensors)


@pytest.mark.parametrize(("name", "ending"), SCALES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_scale_is_not_finite(name, ending, value, tmp_path):
    config, tensors = parts_of(name)
    tensors[ending].view(-1)[0] = value
    with pytest.raises(CheckpointError, match=rf"{NAME}\.\S+ (holds NaN or infinity|is)"):
        read_all(tmp_path, config, tensors)


@pytest.mark.parametrize(("name", "ending"), FACTORS)
def test_a_scale_of_zero_loses_codes(name, ending, tmp_path):
    config, tensors = parts_of(name)
    tensors[ending].view(-1)[0] = 0
    with pytest.raises(CheckpointError, match=rf"{NAME}\.\S+ (has a scale of zero|is zero)"):
        read_all(tmp_path, config, tensors)


@pytest.mark.parametrize(("name", "ending"), SCALES)
def test_a_scale_has_another_shape(name, ending, tmp_path):
    config, tensors = parts_of(name)
    tensors[ending] = torch.ones(5, 3).to(tensors[ending].dtype)
    with pytest.raises(MapconvError, match=NAME):
        read_all(tmp_path, config, tensors)


def test_a_block_of_zeros_is_a_block_of_zeros(tmp_path):
    """Pruned weights, padding: a scale of zero loses nothing there."""
    config, tensors = parts_of("fp8-blocks")
    tensors["weight"][:16, :16] = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    tensors["weight_scale_inv"][0, 0] = 0
    assert not read_all(tmp_path, config, tensors)[f"{NAME}.weight"].view(32, 64)[:16, :16].any()


@pytest.mark.parametrize("index", [-2, 99])
@pytest.mark.parametrize(("name", "ending"), [("gptq-order", "g_idx"), ("ct-int4-order", "weight_g_idx")])
def test_a_group_that_does_not_exist(name, ending, index, tmp_path):
    config, tensors = parts_of(name)
    tensors[ending][3] = index
    with pytest.raises(CheckpointError, match=rf"{NAME}\.{ending} names a group"):
        read_all(tmp_path, config, tensors)


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [32]}, {"shape": [32, -64]}, {"shape": "32x64"}, {"shape": [1 << 40, 1 << 40]}, {"blocksize": 0},
        {"blocksize": 63}, {"blocksize": True}, {"dtype": "int8"}, {"quant_type": "fp4"}, {"nested_blocksize": "x"},
        {"nested_offset": None}, {"nested_offset": math.inf}, {"nested_offset": 10**400},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_that_describes_no_weight(change, tmp_path):
    config, tensors = parts_of("nf4-double")
    state = json.loads(bytes(tensors[STATE].tolist())) | change
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=NAME):
        read_all(tmp_path, config, tensors)


@pytest.mark.parametrize("content", [b"", b"not json", b"[]", b"[" * 5000, b"\xff\xfe", b" " * 100_000])
def test_a_state_that_is_no_object(content, tmp_path):
    config, tensors = parts_of("nf4")
    tensors[STATE] = torch.tensor(list(content), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=rf"{STATE}|weight"):
        read_all(tmp_path, config, tensors)


@pytest.mark.parametrize("value", [7.0, math.nan])
def test_a_code_book_out_of_range(value, tmp_path):
    config, tensors = parts_of("nf4")
    tensors["weight.quant_map"] = tensors["weight.quant_map"].clone()
    tensors["weight.quant_map"][2] = value
    with pytest.raises(CheckpointError, match="no codebook contains"):
        read_all(tmp_path, config, tensors)


@pytest.mark.parametrize(
    ("settings_of", "tensors_of"),
    [("nf4", "gptq-4"), ("gptq-4", "nf4"), ("fp8-blocks", "ct-int4"), ("awq", "fp8-blocks"), ("ct-int8", "mlx-4")],
)
def test_a_method_over_the_tensors_of_another(settings_of, tensors_of, tmp_path):
    with pytest.raises(MapconvError, match=rf"{NAME}|none of its tensors"):
        read_all(tmp_path, parts_of(settings_of)[0], parts_of(tensors_of)[1])


@pytest.mark.parametrize(
    "settings_",
    [
        {"quant_method": "aqlm"}, {"quant_method": "hqq"}, {"quant_method": "quanto"}, {"quant_method": "eetq"},
        {"quant_method": "gptq", "checkpoint_format": "marlin"}, {"quant_method": "awq", "version": "gemv"},
        {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
    ],
    ids=str,
)  # fmt: skip
def test_an_unknown_storage_is_refused_by_name(settings_, tmp_path):
    with pytest.raises(UnsupportedError, match=settings_["quant_method"]):
        read_all(tmp_path, {"quantization_config": settings_}, parts_of("gptq-4")[1])


def mutate(tensors: Tensors, data: st.DataObject) -> None:
    """One change to one tensor."""
    ending = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[ending].contiguous()
    kind = data.draw(st.sampled_from(["drop", "dtype", "shape", "cut", "bytes", "copy"]))
    if kind == "drop":
        del tensors[ending]
    elif kind == "dtype":
        dtype = data.draw(st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.float16, torch.float8_e4m3fn]))
        flat = tensor.view(-1).view(torch.uint8)
        tensors[ending] = flat[: flat.numel() // dtype.itemsize * dtype.itemsize].clone().view(dtype)
    elif kind == "shape":
        tensors[ending] = (
            tensor.view(data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (2, -1)])))
            if (tensor.numel() % 2 == 0 and tensor.numel())
            else tensor
        )
    elif kind == "cut":
        tensors[ending] = tensor.reshape(-1)[: data.draw(st.integers(0, tensor.numel()))]
    elif kind == "bytes":
        flat = tensor.view(-1).view(torch.uint8)
        for position in data.draw(st.lists(st.integers(0, max(0, flat.numel() - 1)), min_size=1, max_size=4)):
            if flat.numel():
                flat[position] = data.draw(st.integers(0, 255))
    else:
        tensors[data.draw(st.sampled_from(["weight", "scales", "weight_scale", "g_idx", "SCB"]))] = tensor.clone()


@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations(data, tmp_path):
    """Values, or an error of ours: never another, whatever one or two changes do to the tensors."""
    config, tensors = parts_of(data.draw(st.sampled_from(sorted(STORAGES))))
    tensors = {ending: tensor.clone() for ending, tensor in tensors.items()}
    for _ in range(data.draw(st.integers(1, 2))):
        if tensors:
            mutate(tensors, data)
    sentence = ""
    try:
        read_all(tmp_path, config, tensors)
    except MapconvError as error:
        sentence = str(error)
    assert "\n" not in sentence
