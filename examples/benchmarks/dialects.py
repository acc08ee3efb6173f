"""A LoRA of SDXL's size in kohya's form: mapconv beside ``cp``, beside reading, and beside diffusers.

SDXL's U-Net (5.1 GB in float16) in a folder of diffusers, and a LoRA of rank 32 on its 722 linear layers of attention,
both of random numbers. ``upgrade`` is held against reading the same bytes, ``merge`` against copying the folder,
with and without waiting for the disk: mapconv's files are on it when it ends.

    python examples/benchmarks/dialects.py /tmp/bench [--runs 3] [--diffusers]

Needs diffusers, for the names of the U-Net. ``--diffusers`` times its load, fuse and save as well, and
says what each step takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from measure import Run, mapconv, median, python, run
from safetensors.torch import save_file

from mapconv.checkpoint.writer import FixedFile, TensorSpec, lay_out

RANK = 32
#: (block, attentions, transformer blocks in each, width) of SDXL's U-Net.
LEVELS = [
    ("down_blocks.1", 2, 2, 640),
    ("down_blocks.2", 2, 10, 1280),
    ("mid_block", 1, 10, 1280),
    ("up_blocks.0", 3, 10, 1280),
    ("up_blocks.1", 3, 2, 640),
]
SQUARE = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0")
CONFIG = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
START_UP = "import mapconv.commands.{}"
READ = """
import sys
for name in sys.argv[1:]:
    with open(name, "rb", buffering=0) as file:
        buffer = bytearray(8 << 20)
        while file.readinto(buffer): pass
"""
DIFFUSERS = """
import sys, time
steps = []
def step(name): steps.append((name, time.perf_counter(), time.process_time()))
step("imports")
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
base, adapter, out = sys.argv[1:]
step("base")
unet = UNet2DConditionModel.from_pretrained(base, torch_dtype=torch.float16)
step("adapter")
state, alphas = StableDiffusionXLPipeline.lora_state_dict(adapter, unet_config=unet.config)
StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet)
step("fuse")
unet.fuse_lora(); unet.unload_lora()
step("save")
unet.save_pretrained(out)
step("")
took = [f"{a[0]} {b[1] - a[1]:.1f} s ({b[2] - a[2]:.1f} CPU s)" for a, b in zip(steps, steps[1:])]
print(", ".join(took))
"""


def linears() -> Iterator[tuple[str, int, int]]:
    """(name, out, in) of the 722 linear layers."""
    for level, attentions, depth, width in LEVELS:
        for attention in range(attentions):
            path = f"{level}.attentions.{attention}"
            yield f"{path}.proj_in", width, width
            yield f"{path}.proj_out", width, width
            for number in range(depth):
                block = f"{path}.transformer_blocks.{number}"
                for name in (
                    "attn1.to_q",
                    "attn1.to_k",
                    "attn1.to_v",
                    "attn1.to_out.0",
                    "attn2.to_q",
                    "attn2.to_out.0",
                ):
                    yield f"{block}.{name}", width, width
                yield f"{block}.attn2.to_k", width, 2048
                yield f"{block}.attn2.to_v", width, 2048
                yield f"{block}.ff.net.0.proj", 8 * width, width
                yield f"{block}.ff.net.2", width, 4 * width


def write_unet(folder: Path) -> Path:
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    file = folder / "diffusion_pytorch_model.safetensors"
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(CONFIG)
    specs = [TensorSpec(name, "F16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    header, placed = lay_out(file, specs, {"format": "pt"})
    output = FixedFile(file, header, placed[-1].stop)
    generator = torch.Generator().manual_seed(1)
    for ref in placed:
        output.write((torch.randn(ref.shape, generator=generator) * 0.02).half(), ref.start)
    output.close()
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **CONFIG}))
    return folder


def write_lora(file: Path) -> Path:
    if file.exists():
        return file
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, height, width in linears():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.alpha"] = torch.tensor(float(RANK) / 2)
        tensors[f"{key}.lora_down.weight"] = (torch.randn(RANK, width, generator=generator) * 0.02).half()
        tensors[f"{key}.lora_up.weight"] = (torch.randn(height, RANK, generator=generator) * 0.02).half()
    save_file(tensors, file, metadata={"ss_network_module": "networks.lora", "ss_network_dim": str(RANK)})
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--diffusers", action="store_true")
    options = parser.parse_args()
    base, lora = write_unet(options.folder / "unet"), write_lora(options.folder / "style.safetensors")
    weights, out = base / "diffusion_pytorch_model.safetensors", options.folder / "out"
    synced = f"cp -r {base} {out} && sync -f {out}"
    for command in ("upgrade", "merge"):
        start_up = median([python(START_UP.format(command)) for _ in range(options.runs)])
        peers = {"reading": lambda: python(READ, weights, lora)}
        if command == "merge":
            peers = {"cp": lambda: run("cp", "-r", base, out), "cp and sync": lambda: run("sh", "-c", synced)}
            if options.diffusers:
                peers["diffusers"] = lambda: python(DIFFUSERS, base, lora, out)
        ours: list[Run] = []
        others: dict[str, list[Run]] = {name: [] for name in peers}
        for _ in range(options.runs):
            ours.append(_fresh(out, lambda c=command: mapconv(c, lora, "--base", base, "-o", out, "-q")))
            for name, peer in peers.items():
                others[name].append(_fresh(out, peer))
        _report(command, median(ours), start_up, {name: median(runs) for name, runs in others.items()})


def _fresh(out: Path, command) -> Run:
    shutil.rmtree(out, ignore_errors=True)
    return command()


def _report(command: str, ours: Run, start_up: Run, others: dict[str, Run]) -> None:
    net, net_cpu = ours.seconds - start_up.seconds, ours.cpu - start_up.cpu
    print(f"{command}: {ours.seconds:.2f} s, {ours.cpu:.2f} CPU s, {ours.megabytes:.0f} MB; ", end="")
    print(f"net of start-up {net:.2f} s, {net_cpu:.2f} CPU s", flush=True)
    for name, other in others.items():
        print(f"  {name}: {other.seconds:.2f} s, {other.cpu:.2f} CPU s, {other.megabytes:.0f} MB; ", end="")
        if name == "diffusers":
            print(f"{other.seconds / ours.seconds:.2f} × ours whole, {other.cpu / ours.cpu:.2f} × in CPU s")
            print(f"    {other.output}")
        else:
            print(f"ours net of start-up {net / other.seconds:.2f} ×, {net_cpu / max(0.01, other.cpu):.2f} × in CPU s")


if __name__ == "__main__":
    main()
