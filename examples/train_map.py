"""Train a MAP adapter from scratch on a text file, save it, and check that the file computes what was trained.

python examples/train_map.py MODEL TEXT OUT [STEPS]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mapconv import MapConfig, get_map_model, load_adapter, save_adapter
from mapconv.nn import factor_parameters, scalar_parameters

LENGTH, RATE = 128, 5e-4


def main(folder: str, text: str, out: str, steps: str = "20") -> None:
    tokens = AutoTokenizer.from_pretrained(folder)(
        Path(text).read_text(encoding="utf-8"), return_tensors="pt"
    ).input_ids
    blocks = [tokens[:, start : start + LENGTH] for start in range(0, tokens.shape[1] - 1, LENGTH)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    get_map_model(model, MapConfig(rank=8, targets="all-linear"))
    # One learning rate serves both: the scalars are held relative to ‖W0‖. Weight decay would shrink the base itself.
    groups = [
        {"params": factor_parameters(model, "default"), "weight_decay": 0.01},
        {"params": scalar_parameters(model, "default"), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    held_out = blocks.pop() if len(blocks) > 1 else blocks[0]
    print(f"loss before {evaluate(model, held_out):.4f}")
    for number in range(int(steps)):
        block = blocks[number % len(blocks)]
        model(input_ids=block, labels=block).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = evaluate(model, held_out)
    print(f"loss after {steps} steps {trained:.4f}")
    save_adapter(model, out)
    again = load_adapter(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), out)
    print(f"saved to {out}; loaded again, the loss differs by {abs(evaluate(again, held_out) - trained):.1e}")


@torch.no_grad()
def evaluate(model, block: torch.Tensor) -> float:
    return float(model(input_ids=block, labels=block).loss)


if __name__ == "__main__":
    main(*sys.argv[1:])
