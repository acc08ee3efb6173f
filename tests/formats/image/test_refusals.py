"""What is wrong with a file of an image adapter, or with the base that it is given, in one sentence."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mapconv
from mapconv.errors import AdapterError, MapconvError, PlacementError, UnsupportedError
from mapconv.formats import read_adapter

from .bases import flux_file
from .updates import KINDS

KEY = "lora_unet_mid_block_attentions_0_proj_in"
FACTORS = {f"{KEY}.lora_down.weight": torch.ones(2, 8), f"{KEY}.lora_up.weight": torch.ones(8, 2)}


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "unet"
    folder.mkdir()
    tensors = {"mid_block.attentions.0.proj_in.weight": torch.ones(8, 8), "mid_block.x.weight": torch.ones(8, 8)}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    return folder


def file(tmp_path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, tmp_path / "style.safetensors", metadata=metadata or None)
    return tmp_path / "style.safetensors"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"unet.mid_block.x.lora_A.weight": torch.ones(2, 8)}, r"two dialects, kohya.*and diffusers"),
        ({f"{KEY}_b.lora_down.weight": torch.ones(2, 8)}, r"has no counterpart \(up\)"),
        ({f"{KEY}_b.alpha": torch.tensor(1.0)}, r"alpha of a module that the file has not got"),
        ({f"{KEY}.alpha": torch.tensor(float("nan"))}, "is nan, expected a number"),
        ({f"{KEY}.alpha": torch.ones(2)}, "expected one number"),
        ({f"{KEY}.lora_up.weight": torch.ones(8, 3)}, "no factors of one weight"),
        ({f"{KEY}.lora_up.weight": torch.ones(8, 2, dtype=torch.int8)}, "has dtype I8"),
        ({f"{KEY}.dora_scale": torch.ones(5)}, r"is \[5\], expected \[8, 1\] or \[1, 8\]"),
        ({f"{KEY}.hada_w1_a": torch.ones(8, 2)}, "make no update"),
        ({f"{KEY}.reshape_weight": torch.ones(2)}, "has none of those"),
    ],
)
def test_broken_files(more, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        mapconv.inspect(file(tmp_path, FACTORS | more))


def test_two_endings_in_one_file(tmp_path):
    tensors = {f"diffusion_model.a.lora_{part}.weight": torch.ones(2, 2) for part in ("A", "B", "up", "down")}
    renamed = {
        key.replace(".a.lora_up", ".b.lora_up").replace(".a.lora_d", ".b.lora_d"): t for key, t in tensors.items()
    }
    with pytest.raises(UnsupportedError, match="two dialects"):
        mapconv.inspect(file(tmp_path, renamed))


def test_a_key_that_means_two_modules(base, tmp_path):
    key = "lora_unet_a_b_c"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 8), f"{key}.lora_up.weight": torch.ones(8, 2)}
    save_file(
        {"a.b_c.weight": torch.ones(8, 8), "a_b.c.weight": torch.ones(8, 8)},
        base / "diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(PlacementError, match=r"it may mean a\.b_c and a_b\.c, and fits each of them"):
        mapconv.merge(file(tmp_path, tensors), tmp_path / "merged", base=base)


def test_other_shapes_and_other_models(base, tmp_path):
    small = {f"{KEY}.lora_down.weight": torch.ones(2, 6), f"{KEY}.lora_up.weight": torch.ones(8, 2)}
    with pytest.raises(PlacementError, match=r"proj_in\.weight is \[8, 8\], the adapter expects \[8, 6\]"):
        mapconv.merge(file(tmp_path, small), tmp_path / "merged", base=base)
    (tmp_path / "llm").mkdir()
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)}, tmp_path / "llm" / "model.safetensors")
    with pytest.raises(PlacementError, match=r"1 of the adapter's 1 module does not fit this base"):
        mapconv.merge(file(tmp_path, FACTORS), tmp_path / "merged", base=tmp_path / "llm")


def test_alpha_zero_is_no_update(base, tmp_path):
    result = mapconv.upgrade(file(tmp_path, FACTORS | {f"{KEY}.alpha": torch.tensor(0.0)}), base=base)
    assert [(item.beta, item.error) for item in result.modules] == [(0.0, 0.0)]


def test_metadata_that_would_paint_the_terminal(run, tmp_path):
    hostile = "networks.\x1b[31mevil\u202e\nmapconv: all is well"
    source = file(tmp_path, FACTORS | {"lora_unet_x.oft_blocks": torch.ones(2)}, ss_network_module=hostile)
    output = run("inspect", source).err
    assert "oft_blocks" in output
    assert not any(mark in output for mark in ("\x1b", "\u202e", "\nmapconv: all"))


def test_diffusers_metadata_that_is_none(tmp_path):
    tensors = {f"unet.a.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    for text in ("[]", "{", '{"unet.r": "two"}', '{"unet.lora_alpha": NaN}'):
        with pytest.raises(MapconvError):
            mapconv.inspect(file(tmp_path, tensors, lora_adapter_metadata=text))


def test_any_change_of_a_file_is_a_sentence(tmp_path):
    """Keys dropped or renamed, shapes and dtypes of all kinds: a file is read, or refused in a sentence of ours."""
    chosen = random.Random(5)
    generator = torch.Generator().manual_seed(5)
    endings = sorted({ending for make in KINDS.values() for ending in make(torch.Size((6, 8, 3, 3)), generator)[0]})
    refused = 0
    for turn in range(120):
        kind = chosen.choice(list(KINDS))
        parts, _ = KINDS[kind](torch.Size(chosen.choice([(6, 8), (8, 6, 3, 3)])), generator)
        parts["dora_scale"] = torch.ones(6, 1)
        for _ in range(chosen.randint(1, 2)):
            name = chosen.choice(list(parts))
            change = chosen.randrange(4)
            if change == 0:
                del parts[name]
            elif change == 1:
                parts[chosen.choice(endings)] = parts.pop(name)
            elif change == 2:
                shape = [chosen.choice([0, 1, 2, 6, 8]) for _ in range(chosen.randrange(5))]
                parts[name] = torch.zeros(shape)
            else:
                parts[name] = parts[name].to(chosen.choice([torch.int64, torch.bool, torch.float64, torch.bfloat16]))
            if not parts:
                break
        prefix = chosen.choice([KEY, "diffusion_model.a.b", "lycoris_a"])
        source = tmp_path / f"{turn}.safetensors"
        save_file({f"{prefix}.{ending}": tensor for ending, tensor in parts.items()} or {"x": torch.ones(1)}, source)
        try:
            read_adapter(source)
        except MapconvError:
            refused += 1
    assert 20 < refused < 120


def test_a_text_encoder_that_a_file_of_a_denoiser_has_not_got(tmp_path):
    flux = flux_file(tmp_path / "flux").path
    tensors = {key.replace("lora_unet_", "lora_te1_text_model_"): tensor for key, tensor in FACTORS.items()}
    with pytest.raises(mapconv.MapconvError, match=r"adapts text_encoder .* but the base has only denoiser"):
        mapconv.merge(file(tmp_path, tensors), tmp_path / "out.safetensors", base=flux)


def test_a_result_that_is_a_folder_is_not_named_as_a_file(base, run, tmp_path):
    source = file(tmp_path, FACTORS)
    for command, name in (("merge", "out.safetensors"), ("upgrade", "out.gguf")):
        done = run(command, source, "--base", base, "-o", tmp_path / name)
        assert (done.status, "is a file's name" in done.err) == (1, True), done.err
        assert not (tmp_path / name).exists()


def test_the_part_that_is_there_is_named(tmp_path):
    tensors = {"lora_unet_conv_in.alpha": torch.tensor(1.0), "lora_unet_conv_in.lora_down.weight": torch.zeros(2, 8)}
    with pytest.raises(mapconv.MapconvError, match=r"lora_down\.weight has no counterpart"):
        mapconv.inspect(file(tmp_path, tensors))
