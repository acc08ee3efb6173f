"""Today's exports beside those that the libraries have read (``tests.exporting.stored_files``)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mapconv.checkpoint.gguf.header import read_gguf
from tests.exporting.stored_files import EXPORTS, STORED, content, exported


def read(file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(metadata, tensors) of a file of either format."""
    if file.suffix == ".gguf":
        header = read_gguf(file)
        data = np.fromfile(file, np.uint8)
        values = {
            t.name: torch.from_numpy(data[t.start : t.stop].view(np.float32)).view(t.shape) for t in header.tensors
        }
        return header.metadata, values
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}, load_file(file)


def plain(metadata: dict) -> dict:
    """Without what differs from run to run: hashes, names of folders, our version."""
    return {name: value for name, value in metadata.items() if "hash" not in name and name != "mapconv_version"}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_the_one_that_its_library_read(name, tmp_path):
    out = exported(name, tmp_path)
    file = content(name, out)
    metadata, tensors = read(file)
    known, wanted = read(STORED / f"{name}{file.suffix}")
    assert plain(metadata) == plain(known)
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=1e-6, atol=1e-7, msg=key)
    if (STORED / f"{name}.json").exists():
        config, stored = (
            json.loads(path.read_text()) for path in (out / "adapter_config.json", STORED / f"{name}.json")
        )
        assert config | {"model": None} == stored | {"model": None}
