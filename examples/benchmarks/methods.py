"""PEFT's methods besides LoRA on SmolLM2-135M: ``mapconv merge`` beside PEFT's own load, merge and save.

    python examples/benchmarks/methods.py FOLDER [--methods LOHA OFT …]

FOLDER/base is SmolLM2 (``smollm2_dora.py`` writes it). Each method gets an adapter of random values on every linear
layer of the decoder. Both sides compute and store float32, each in a process of its own; times are CPU seconds with
start-up, peaks are the kernel's. The merged weights are compared with PEFT's as a share of the update.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from safetensors import safe_open

from mapconv.runtime.models import load_model

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import mapconv, python

#: Settings that fit layers of 576, 192 and 1536 features.
SETTINGS = {
    "ADALORA": {"init_r": 8, "total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 64},
    "DELORA": {"r": 8},
    "FOURIERFT": {"n_frequency": 1000},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "HRA": {"r": 8},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LOHA": {"r": 8},
    "LOKR": {"r": 8},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 32, "r": 0},
    "RANDLORA": {"r": 32},
    "ROAD": {},
    "SHIRA": {"r": 8},
    "VBLORA": {"r": 4, "num_vectors": 64, "vector_length": 64},
    "VERA": {"r": 64},
    "WAVEFT": {"n_frequency": 1000},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PEFT = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def write_adapter(folder: Path, base: Path, method: str) -> Path:
    """An adapter of random values."""
    if (folder / "adapter_config.json").exists():
        return folder
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PeftConfig.from_peft_type(peft_type=method, target_modules=TARGETS, **SETTINGS[method])
        model = get_peft_model(load_model(base, dtype="float32", device="cpu"), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
    return folder


def difference(base: Path, ours: Path, theirs: Path) -> float:
    """‖ours − theirs‖ beside ‖theirs − base‖, at most."""
    worst = 0.0
    with (
        safe_open(base / "model.safetensors", "pt") as before,
        safe_open(ours / "model.safetensors", "pt") as one,
        safe_open(theirs / "model.safetensors", "pt") as two,
    ):
        names = two.keys()
        for name in names:
            wanted = two.get_tensor(name).double()
            update = float((wanted - before.get_tensor(name).double()).norm())
            if update:
                worst = max(worst, float((one.get_tensor(name).double() - wanted).norm()) / update)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", choices=sorted(SETTINGS), default=list(SETTINGS), metavar="METHOD")
    arguments = parser.parse_args()
    base, ours, theirs = (arguments.folder / name for name in ("base", "merged-by-mapconv", "merged-by-peft"))
    print("method      mapconv            PEFT               time  peak  off by")
    for method in arguments.methods:
        adapter = write_adapter(arguments.folder / method.lower(), base, method)
        own = mapconv("merge", adapter, "--base", base, "-o", ours, "--dtype", "float32", "--force", "-q")
        peer = python(_PEFT, base, adapter, theirs)
        print(
            f"{method:<10}  {own.cpu:5.1f} s  {own.megabytes:5.0f} MB  {peer.cpu:5.1f} s  {peer.megabytes:5.0f} MB  "
            f"{own.cpu / peer.cpu:4.2f}  {own.megabytes / peer.megabytes:4.2f}  {difference(base, ours, theirs):.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
