"""Extraction of a finetune of Llama-3.2-1B's shape beside float64 SVDs of its differences: time, memory, optimum.

    python examples/benchmarks/extract.py FOLDER [--layers 16] [--rank 16] [--svd-layers 1]

The finetune is the random base plus an update whose singular values fall as 1/i, about 1 % of each weight, in bfloat16.
The peer does what mergekit-extract-lora does: one weight after another, the difference in float32, and of all of it
``torch.linalg.svd``. It is timed on ``--svd-layers`` layers and scaled up. The optimum is that of float64 SVDs of two
shapes. Times are CPU seconds of the process, start-up included.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from llama_shape import LINEARS, write_model
from measure import mapconv


def write_finetune(folder: Path, base: Path, *, share: float = 0.01, directions: int = 64) -> Path:
    """The base plus an update of falling singular values in its linear weights, and norms moved by 1 %."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(3)
    for shard in sorted(base.glob("*.safetensors")):
        tensors = load_file(shard)
        for name, weight in tensors.items():
            if "_proj" in name:
                left = torch.randn(weight.shape[0], directions, generator=draw) / torch.arange(1, directions + 1)
                update = left @ torch.randn(directions, weight.shape[1], generator=draw)
                wide = weight.float()
                tensors[name] = (wide + share * wide.norm() / update.norm() * update).bfloat16()
            elif "norm" in name:
                tensors[name] = (weight.float() * 1.01).bfloat16()
        save_file(tensors, folder / shard.name, metadata={"format": "pt"})
    for name in ("config.json", "model.safetensors.index.json"):
        (folder / name).write_text((base / name).read_text())
    return folder


def tensor(folder: Path, name: str) -> torch.Tensor:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / index[name], "pt") as file:
        return file.get_tensor(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--svd-layers", type=int, default=1)
    arguments = parser.parse_args()
    base = write_model(arguments.folder / f"base-{arguments.layers}", arguments.layers)
    tuned = write_finetune(arguments.folder / f"tuned-{arguments.layers}", base)
    out = arguments.folder / "extracted"
    for options in ([], ["--lora-compatible"]):
        run = mapconv("extract", tuned, "--base", base, "-o", out, "--rank", arguments.rank, "--force", "-q", *options)
        print(f"mapconv extract {' '.join(options)}: {run.cpu:.1f} s of CPU, {run.megabytes:.0f} MB", flush=True)
    modules = {m["path"]: m for m in json.loads((out / "map_config.json").read_text())["modules"]}
    started, worst = time.process_time(), 0.0
    for layer in range(arguments.svd_layers):
        for name in LINEARS:
            path = f"model.layers.{layer}.{name}"
            change = tensor(tuned, f"{path}.weight").float() - tensor(base, f"{path}.weight").float()
            torch.linalg.svd(change, full_matrices=False)
    peer = (time.process_time() - started) * arguments.layers / arguments.svd_layers
    print(f"float32 SVDs of all weights: {peer:.0f} s of CPU ({peer / run.cpu:.0f} ×), scaled up", flush=True)
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        path = f"model.layers.0.{name}"
        change = tensor(tuned, f"{path}.weight").double() - tensor(base, f"{path}.weight").double()
        values = torch.linalg.svdvals(change).square()
        best = float(values[arguments.rank :].sum() / values.sum()) ** 0.5
        worst = max(worst, modules[path]["error"] / best - 1)
        print(f"{name}: ε {modules[path]['error']:.5f}, optimum {best:.5f}", flush=True)
    print(f"excess over the optimum of float64 SVDs: {worst:.2%} at most")


if __name__ == "__main__":
    main()
