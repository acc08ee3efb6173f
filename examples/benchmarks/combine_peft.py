"""Two real LoRAs as one, beside PEFT's ``add_weighted_adapter`` and the dense float64 sum of their updates.

    python examples/benchmarks/combine_peft.py FOLDER [--weights 0.7 0.3] [--rank 16]

FOLDER holds SmolLM2 (base) with the adapters lora (rank 16) and code (rank 8, rsLoRA's scaling), which
``smollm2_finetune.py`` writes. Every row is an adapter on disk: its error is ‖stored update − dense sum‖ beside the
dense sum, over all weights and of the worst one. Times are CPU seconds of a process, start-up included.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import mapconv, python

_PEFT = """
import sys, warnings
warnings.simplefilter("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, one, two, w1, w2, kind, rank, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one, adapter_name="one")
model.load_adapter(two, adapter_name="two")
options = {"svd_rank": int(rank)} if kind == "svd" else {}
model.add_weighted_adapter(["one", "two"], [float(w1), float(w2)], "sum", combination_type=kind, **options)
model.save_pretrained(out, selected_adapters=["sum"])
"""


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """scaling · BA of every weight, dense, float64, by the documented meaning of the configuration."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), {}
    factors = load_file(folder / "adapter_model.safetensors")
    for key in (key for key in factors if ".lora_A." in key):
        A, B = factors[key].double(), factors[key.replace(".lora_A.", ".lora_B.")].double()
        path = key.removeprefix("base_model.model.").partition(".lora_A.")[0]
        rank = next((r for end, r in config["rank_pattern"].items() if path.endswith(end)), config["r"])
        alpha = next((a for end, a in config["alpha_pattern"].items() if path.endswith(end)), config["lora_alpha"])
        tensors[path] = alpha / (rank**0.5 if config["use_rslora"] else rank) * (B @ A)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=float, nargs=2, default=(0.7, 0.3))
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    base, one, two, out = (arguments.folder / name for name in ("base", "lora", "code", "sum"))
    first, second = (updates(folder) for folder in (one, two))
    w1, w2 = arguments.weights
    wanted = {path: w1 * first[path] + w2 * second[path] for path in first}
    del first, second

    def report(name: str, folder: Path, cpu: float) -> None:
        made = updates(folder)
        errors = {path: float((made[path] - value).norm()) for path, value in wanted.items()}
        norms = {path: float(value.norm()) for path, value in wanted.items()}
        total = (sum(e**2 for e in errors.values()) / sum(n**2 for n in norms.values())) ** 0.5
        worst = max(errors[path] / norms[path] for path in wanted)
        print(f"{name:<36}  {cpu:6.1f} s  {total:.2e}  {worst:.2e}", flush=True)

    print(f"{'':<36}       CPU       all     worst")
    for options in ([], ["--rank", arguments.rank]):
        words = [one, two, "--base", base, "--weights", f"{w1},{w2}", "-o", out, "--force", "-q", "--lora-compatible"]
        run = mapconv("combine", *words, *options)
        report(f"mapconv combine {' '.join(map(str, options)) or '(exact)'}", out, run.cpu)
    for kind in ("cat", "svd"):
        run = python(_PEFT, base, one, two, w1, w2, kind, arguments.rank, arguments.folder / "peft")
        report(
            f"PEFT, {kind}{f' to rank {arguments.rank}' * (kind == 'svd')}", arguments.folder / "peft" / "sum", run.cpu
        )
    total = sum(float(value.norm()) ** 2 for value in wanted.values())
    left = sum(float(torch.linalg.svdvals(value)[arguments.rank :].square().sum()) for value in wanted.values())
    print(f"{f'optimum at rank {arguments.rank}':<36}            {(left / total) ** 0.5:.2e}")


if __name__ == "__main__":
    main()
