"""What the libraries themselves wrote and read: from their stored outputs, and anew where the library is installed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mapconv.checkpoint.codecs import plain_view
from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.quantization import quantization_settings
from mapconv.checkpoint.reader import TensorReader

from .oracles import CASES, STORED, Case


def decoded(case: Case, folder) -> dict[str, torch.Tensor]:
    """The values of every weight of a case, by mapconv."""
    config, tensors, _ = case
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with TensorReader() as reader:
        settings = quantization_settings(folder, config)
        checkpoint = plain_view(read_checkpoint(folder), config, settings, reader)
        return {name: reader.read(ref) for name, ref in checkpoint.tensors.items()}


def stored_case(name: str) -> Case:
    with safe_open(STORED / f"{name}.safetensors", framework="pt") as file:
        config, parts = json.loads(file.metadata()["config"]), {"stored": {}, "value": {}}
        for key in file.keys():  # noqa: SIM118
            part, _, tensor = key.partition("/")
            parts[part][tensor] = file.get_tensor(key)
    return config, parts["stored"], parts["value"]


def assert_values(got: dict[str, torch.Tensor], case: Case, dtype: torch.dtype) -> None:
    values = case[2]
    assert got.keys() == values.keys()
    for name, expected in values.items():
        assert got[name].shape == expected.shape
        # Where the library multiplies in 16 bits, its value is ours but for the rounding of scale and product.
        assert torch.allclose(got[name], expected.float(), rtol=0 if dtype == torch.float32 else 2**-7, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_stored(name, tmp_path):
    case = stored_case(name)
    assert_values(decoded(case, tmp_path), case, CASES[name][2])


@pytest.mark.parametrize("name", CASES)
def test_library(name, tmp_path):
    library, make, dtype = CASES[name]
    pytest.importorskip(library)
    case = make()
    assert_values(decoded(case, tmp_path), case, dtype)
