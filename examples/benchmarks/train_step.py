"""Time and peak memory of one training step: MAP beside PEFT's LoRA and DoRA, at equal rank on every linear layer.

python examples/benchmarks/train_step.py MODEL [--device cuda] [--dtype bfloat16] [--tokens 256] [--rank 16]

The methods take turns, step by step, in one process, and ratios are taken within a round. On a CPU, time is the
process's CPU time, which other work on the machine does not stretch. Memory is measured in a process of its own for
each method, as the kernel (CPU) or torch (CUDA) counts it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time

from measure import run

METHODS = ("LoRA", "DoRA", "MAP", "MAP, dora", "MAP, scalars")
WARM_UP = 2


def main() -> None:
    options = parse()
    if options.memory:
        print(json.dumps(memory(options)))
        return
    seconds = times(options)
    alone = [sys.executable, __file__, options.model, *flags(options)]
    peaks = {method: measured(run(*alone, "--memory", method)) for method in METHODS}
    print(
        f"{options.model}: 1×{options.tokens} tokens, {options.dtype} on {options.device}, rank {options.rank}, "
        f"median of {options.rounds} rounds"
    )
    print(f"{'method':<14}{'step':>10}{'× LoRA':>9}{'peak':>11}{'× LoRA':>9}")
    for method in METHODS:
        ratio = statistics.median(own / lora for own, lora in zip(seconds[method], seconds["LoRA"], strict=True))
        print(
            f"{method:<14}{statistics.median(seconds[method]) * 1e3:>7.0f} ms{ratio:>9.3f}"
            f"{peaks[method] / 1e6:>8.0f} MB{peaks[method] / peaks['LoRA']:>9.3f}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args()


def flags(options: argparse.Namespace) -> list[str]:
    names = ("device", "dtype", "tokens", "rank")
    return [word for name in names for word in (f"--{name}", str(getattr(options, name)))]


def measured(finished) -> float:
    """Peak bytes: torch's own count on a GPU, the process's otherwise."""
    on_device = json.loads(finished.output.splitlines()[-1])
    return finished.megabytes * 1e6 if on_device is None else on_device


def build(method: str, options: argparse.Namespace):
    """A model with fresh adapters of one method, and its optimizer."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model.to(options.device)
    torch.manual_seed(0)
    if method.startswith("MAP"):
        from mapconv.nn import MapConfig, factor_parameters, get_map_model

        direction = "dora" if method.endswith("dora") else "low-rank"
        model = get_map_model(model, MapConfig(rank=options.rank, direction=direction))
        if method.endswith("scalars"):
            for parameter in factor_parameters(model, "default"):
                parameter.requires_grad_(False)
    else:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=options.rank, lora_alpha=options.rank, target_modules="all-linear", use_dora=method == "DoRA"
        )
        model = get_peft_model(model, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # ``transformers.Trainer``'s default.
    return model, torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)


def step(model, optimizer, options: argparse.Namespace) -> float:
    """Seconds of one step on random tokens."""
    import torch

    tokens = torch.randint(0, 1000, (1, options.tokens), device=options.device)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    synchronize(options)
    started = clock()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    synchronize(options)
    return clock() - started


def synchronize(options: argparse.Namespace) -> None:
    import torch

    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


def times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each round, by method."""
    trainers = {method: build(method, options) for method in METHODS}
    gc.disable()
    for _ in range(WARM_UP):
        for trainer in trainers.values():
            step(*trainer, options)
    return dict(
        zip(
            METHODS,
            zip(*([step(*trainers[m], options) for m in METHODS] for _ in range(options.rounds)), strict=True),
            strict=True,
        )
    )


def memory(options: argparse.Namespace) -> int | None:
    """A few steps of one method; returns torch's peak on a GPU."""
    import torch

    trainer = build(options.memory, options)
    for _ in range(3):
        step(*trainer, options)
    return torch.cuda.max_memory_allocated() if options.device.startswith("cuda") else None


if __name__ == "__main__":
    main()
