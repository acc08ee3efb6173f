"""A full finetune of SmolLM2-135M and a second adapter on it, for the benchmarks of extract and combine.

    python examples/benchmarks/smollm2_finetune.py OUT [--steps 100] [--adapter-steps 30]

OUT is a folder that ``smollm2_dora.py`` wrote. Adds OUT/full (every weight trained, stored in bfloat16) and OUT/code (a
LoRA with rsLoRA's scaling, rank 8, on every linear layer, trained on the source of Python's own modules instead of its
documentation). One step is four sequences of 64 tokens.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from smollm2_dora import DOCUMENTED, blocks_of, train

from mapconv.runtime.models import load_model

SEQUENCE, BATCH = 64, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--adapter-steps", type=int, default=30)
    arguments = parser.parse_args()
    base = arguments.out / "base"

    text = (arguments.out / "train.txt").read_text(encoding="utf-8")
    model = load_model(base, dtype="float32", device="cpu")
    train(model, blocks_of(base, text, SEQUENCE), arguments.steps, 5e-5, BATCH)
    model.to(torch.bfloat16).save_pretrained(arguments.out / "full")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, arguments.out / "full" / name)

    text = "\n".join(inspect.getsource(importlib.import_module(name)) for name in DOCUMENTED)
    config = LoraConfig(r=8, lora_alpha=8, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    adapter = get_peft_model(load_model(base, dtype="float32", device="cpu"), config)
    train(adapter, blocks_of(base, text, SEQUENCE), arguments.adapter_steps, 5e-4, BATCH)
    adapter.save_pretrained(arguments.out / "code")


if __name__ == "__main__":
    main()
