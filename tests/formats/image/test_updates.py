"""LyCORIS' updates and DoRAs of every axis: merged as they are, and upgraded to the closest MAP weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import UnsupportedError

from .updates import ALPHA, KINDS, RANK, low_rank

SHAPES = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (12, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v.weight": (8, 8),
    "down_blocks.0.resnets.0.conv1.weight": (6, 8, 3, 3),
    "down_blocks.0.resnets.0.conv1.bias": (6,),
    "down_blocks.0.resnets.0.norm1.weight": (8,),
    "down_blocks.0.resnets.0.norm1.bias": (8,),
}
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "unet"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    save_file({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}, folder / FILE)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    return folder


def written(unet: Path, file: Path, kind: str, dora: str | None = None, norm: str = "merged"):
    """A file of one kind of update, and the weights that it makes, by formulas in float64."""
    generator = torch.Generator().manual_seed(7)
    tensors, wanted = {}, {}
    for name, weight in load_file(unet / FILE).items():
        if weight.dim() < 2:
            continue
        key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        parts, delta = KINDS[kind](weight.shape, generator)
        merged = weight.double() + delta
        if dora is not None:
            kept = 0 if dora == "out" else 1
            dims = [number for number in range(weight.dim()) if number != kept]
            of = weight.double() if norm == "base" else merged
            norms = of.norm(dim=dims, keepdim=True) if len(dims) == 1 else of.square().sum(dims, keepdim=True).sqrt()
            scale = (norms * (1 + 0.2 * torch.rand(norms.shape, generator=generator))).float()
            parts["dora_scale"] = scale
            merged = merged * (scale.double() / norms)
        tensors |= {f"{key}.{ending}": tensor for ending, tensor in parts.items()}
        wanted[name] = merged
    save_file(tensors, file)
    return wanted


def check(folder: Path, wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    merged = load_file(folder / FILE)
    assert merged.keys() == SHAPES.keys()
    for name, tensor in wanted.items():
        assert ((merged[name].double() - tensor).norm() / tensor.norm()).item() < tolerance, name


@pytest.mark.parametrize("dora", [None, "out", "in"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_it_is_and_upgraded(kind, dora, unet, tmp_path):
    file = tmp_path / "style.safetensors"
    wanted = written(unet, file, kind, dora)
    result = mapconv.merge(file, tmp_path / "merged", base=unet)
    check(tmp_path / "merged", wanted)
    assert result.method == ("LoRA" if dora is None else "DoRA")
    # At full rank the refit is exact, whatever the kind.
    mapconv.upgrade(file, tmp_path / "map", base=unet, rank=8)
    mapconv.merge(tmp_path / "map", tmp_path / "again", base=unet)
    check(tmp_path / "again", wanted, 2e-6)


def test_a_product_of_low_rank_is_exact_without_a_rank(unet, tmp_path):
    written(unet, tmp_path / "style.safetensors", "loha")
    assert mapconv.upgrade(tmp_path / "style.safetensors", base=unet).worst_error < 1e-6


@pytest.mark.parametrize("kind", ["full", "lokr"])
def test_an_update_of_full_rank_needs_a_rank(kind, unet, tmp_path):
    file = tmp_path / "style.safetensors"
    written(unet, file, kind)
    with pytest.raises(UnsupportedError, match=r"full rank.*give --rank or --tolerance"):
        mapconv.upgrade(file, base=unet)
    result = mapconv.upgrade(file, base=unet, tolerance=0.5, max_rank=8)
    assert 0 < result.worst_error <= 0.5


@pytest.mark.parametrize("axis", ["out", "in"])
def test_divided_by_the_norm_of_the_base(axis, unet, tmp_path):
    file = tmp_path / "style.safetensors"
    wanted = written(unet, file, "low-rank", axis, "base")
    mapconv.merge(file, tmp_path / "merged", base=unet, dora_norm="base")
    check(tmp_path / "merged", wanted)
    assert "--dora-norm base" in mapconv.inspect(file, dora_norm="base").dora
    mapconv.upgrade(file, tmp_path / "map", base=unet, dora_norm="base", rank=8)
    mapconv.merge(tmp_path / "map", tmp_path / "again", base=unet)
    check(tmp_path / "again", wanted, 2e-6)


def flat_magnitudes(unet: Path, file: Path) -> torch.Tensor:
    """A DoRA of the square weight alone, whose magnitudes are a vector."""
    name = next(name for name, shape in SHAPES.items() if shape == (8, 8))
    parts, _ = low_rank(torch.Size((8, 8)), torch.Generator().manual_seed(3))
    key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
    parts["dora_scale"] = torch.linspace(1, 2, 8)
    save_file({f"{key}.{ending}": tensor for ending, tensor in parts.items()}, file)
    weight = load_file(unet / FILE)[name].double()
    up, down = parts["lora_up.weight"].double(), parts["lora_down.weight"].double()
    return weight + ALPHA / RANK * up @ down


@pytest.mark.parametrize(("axis", "dim"), [("out", 1), ("in", 0)])
def test_nothing_is_guessed_on_a_square_weight(axis, dim, unet, tmp_path):
    file = tmp_path / "style.safetensors"
    merged = flat_magnitudes(unet, file)
    with pytest.raises(UnsupportedError, match="give --dora-axis out or --dora-axis in"):
        mapconv.merge(file, tmp_path / "merged", base=unet)
    mapconv.merge(file, tmp_path / "merged", base=unet, dora_axis=axis)
    scale = torch.linspace(1, 2, 8).double().unsqueeze(dim) / merged.norm(dim=dim, keepdim=True)
    name = next(name for name, shape in SHAPES.items() if shape == (8, 8))
    check(tmp_path / "merged", {name: merged * scale})


def test_an_axis_that_the_file_contradicts(unet, tmp_path):
    written(unet, tmp_path / "style.safetensors", "low-rank", "out")
    with pytest.raises(UnsupportedError, match="magnitudes of outputs: leave --dora-axis in out"):
        mapconv.inspect(tmp_path / "style.safetensors", dora_axis="in")


def test_vectors_grow_and_survive_the_upgrade(unet, tmp_path):
    file = tmp_path / "style.safetensors"
    wanted = written(unet, file, "low-rank")
    key = "lora_unet_down_blocks_0_resnets_0"
    vectors = {f"{key}_conv1.diff_b": 6, f"{key}_norm1.w_norm": 8, f"{key}_norm1.b_norm": 8}
    more = {name: torch.arange(size) / size for name, size in vectors.items()}
    save_file(load_file(file) | more, file)
    base = load_file(unet / FILE)
    for name, leaf in zip(more, ("conv1.bias", "norm1.weight", "norm1.bias"), strict=True):
        stored = f"down_blocks.0.resnets.0.{leaf}"
        wanted[stored] = base[stored].double() + more[name]
    mapconv.merge(file, tmp_path / "merged", base=unet)
    check(tmp_path / "merged", wanted)
    mapconv.upgrade(file, tmp_path / "map", base=unet)
    mapconv.merge(tmp_path / "map", tmp_path / "again", base=unet)
    check(tmp_path / "again", wanted)


@pytest.mark.parametrize("kind", ["loha", "loha-tucker", "lokr-w2", "lokr-both", "lokr-tucker", "tucker"])
def test_the_formulas_are_lycoris_own(kind):
    pytest.importorskip("lycoris")
    from lycoris.functional import locon, loha, lokr

    shape = torch.Size((6, 8, 3, 3))
    parts, delta = KINDS[kind](shape, torch.Generator().manual_seed(2))
    if kind == "tucker":
        parts_in_order = (parts["lora_down.weight"], parts["lora_up.weight"], parts["lora_mid.weight"])
        found = locon.diff_weight(*parts_in_order, gamma=ALPHA / RANK)
    elif kind.startswith("loha"):
        names = ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")
        found = loha.diff_weight(*(parts.get(f"hada_{name}") for name in names), gamma=ALPHA / RANK)
    else:
        names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        found = lokr.kron_weight(*(parts.get(f"lokr_{name}") for name in names), scale=ALPHA / RANK)
    torch.testing.assert_close(found.view(shape).double(), delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "dora", "said"),
    [("loha", None, "LoHa adapter"), ("lokr-w2", None, "LoKr adapter"), ("full", None, "full difference adapter"),
     ("loha", "out", "LoHa with magnitudes adapter"), ("low-rank", "out", "DoRA adapter")],
)  # fmt: skip
def test_inspect_says_what_the_updates_are(kind, dora, said, unet, run, tmp_path):
    written(unet, tmp_path / "style.safetensors", kind, dora)
    done = run("inspect", tmp_path / "style.safetensors")
    assert done.out.startswith(f"{tmp_path / 'style.safetensors'}: {said}, "), done.out
    assert "the factors are kept" not in done.out
