"""A real base model and a DoRA adapter trained on real text, for the benchmarks of fidelity.

    python examples/benchmarks/smollm2_dora.py OUT [--steps 150]

Writes OUT/base (SmolLM2-135M-Instruct), OUT/dora (rank 16, stock PEFT), and the text as OUT/train.txt and
OUT/held-out.txt: Python's own language reference, which ships with Python itself (``pydoc_data.topics``). Held out are
every tenth topic and, because those are short, what some standard modules say of themselves. One step is four
sequences of 256 tokens.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, get_peft_model

from mapconv.commands.demo import write_base_model
from mapconv.runtime.models import load_model, load_tokenizer

SEQUENCE, BATCH, WARMUP = 256, 4, 10
#: Modules with a long text of their own, which is no topic (the debugger's is).
DOCUMENTED = (
    "argparse",
    "csv",
    "difflib",
    "doctest",
    "getopt",
    "heapq",
    "optparse",
    "random",
    "re",
    "sched",
    "shelve",
    "smtplib",
    "statistics",
    "string",
    "struct",
    "timeit",
    "tokenize",
    "typing",
    "unittest",
    "uuid",
)


def write_texts(out: Path) -> None:
    """Split the topics into training and held-out text."""
    parts: dict[str, list[str]] = {"train": [], "held-out": []}
    for number, name in enumerate(sorted(topics)):
        text = re.sub(r"\n{3,}", "\n\n", topics[name]).strip()
        parts["held-out" if number % 10 == 9 else "train"].append(text)
    parts["held-out"] += [importlib.import_module(name).__doc__.strip() for name in DOCUMENTED]
    for name, texts in parts.items():
        (out / f"{name}.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def train(
    model: torch.nn.Module, blocks: torch.Tensor, steps: int, learning_rate: float, batch_size: int = BATCH
) -> None:
    """Train what asks for gradients, on ``batch_size`` of the blocks a step."""
    torch.manual_seed(0)
    model.train()
    order = torch.randperm(len(blocks)).repeat(1 + steps * batch_size // len(blocks))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    started = time.perf_counter()
    for step in range(steps):
        batch = blocks[order[step * batch_size : (step + 1) * batch_size]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9 or step == 0:
            seconds = (time.perf_counter() - started) / (step + 1)
            print(f"step {step + 1}/{steps}: loss {loss.item():.4f}, {seconds:.1f} s a step", flush=True)


def blocks_of(base: Path, text: str, length: int = SEQUENCE) -> torch.Tensor:
    """The text's tokens, (blocks, length)."""
    tokens = torch.tensor(load_tokenizer(base)(text, verbose=False)["input_ids"])
    return tokens[: len(tokens) // length * length].view(-1, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_texts(arguments.out)
    base = arguments.out / "base"
    if not (base / "config.json").exists():
        write_base_model(base)
    text = (arguments.out / "train.txt").read_text(encoding="utf-8")
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_model(base, dtype="float32", device="cpu"), config)
    train(model, blocks_of(base, text), arguments.steps, arguments.learning_rate)
    model.save_pretrained(arguments.out / "dora")


if __name__ == "__main__":
    main()
