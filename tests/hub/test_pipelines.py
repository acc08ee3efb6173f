"""Bases of image models on the Hub: a pipeline of several folders, and a single file, by ranges and whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.formats.image.bases import BASES

KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"
REPO = "lab/painter"


def adapter(folder: Path) -> Path:
    tensors = {f"{KEY}.lora_down.weight": torch.ones(2, 8), f"{KEY}.lora_up.weight": torch.ones(16, 2)}
    save_file(tensors, folder / "style.safetensors")
    return folder / "style.safetensors"


@pytest.mark.parametrize("kind", ["pipeline", "file"])
def test_a_base_of_images(kind, run, hub, tmp_path):
    base, source = BASES[kind](tmp_path / "base"), adapter(tmp_path)
    is_file = base.path.is_file()
    files = {base.path.name: base.path.read_bytes()} if is_file else {}
    hub.repo(
        REPO, files or {str(p.relative_to(base.path)): p.read_bytes() for p in base.path.rglob("*") if p.is_file()}
    )
    name = f"{REPO}/{base.path.name}" if is_file else REPO
    run(hub, "upgrade", source, "-o", tmp_path / "map", "--base", name, "--quiet")
    run(hub, "upgrade", source, "-o", tmp_path / "own", "--base", base.path, "--quiet")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "map" / weights).read_bytes() == (tmp_path / "own" / weights).read_bytes()
    fetched = {request.path for request in hub.log("GET", "/cdn/")}
    out = tmp_path / ("merged.safetensors" if is_file else "merged")
    run(hub, "merge", tmp_path / "map", "-o", out, "--base", name, "--quiet")
    assert fetched  # the headers came by ranges before the whole files did
    module = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    before, after = base.weights(base.path), base.weights(out)
    torch.testing.assert_close(after[module], before[module] + 2)
    assert all(torch.equal(after[other], before[other]) for other in before if other != module)
