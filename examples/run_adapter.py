"""Attach an adapter (MAP, LoRA or DoRA) to a model, show its scalars, and generate with and without it.

python examples/run_adapter.py MODEL ADAPTER PROMPT
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mapconv import disabled, load_adapter, map_layers


def main(folder: str, adapter: str, prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    load_adapter(model, adapter)
    layers = map_layers(model)
    gains = [layer.gains("default") for layer in layers.values()]
    print(f"{len(layers)} layers, α/‖W0‖ from {min(a for a, _ in gains):.4f} to {max(a for a, _ in gains):.4f}")
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    print("adapter:", answer(model, tokenizer, tokens))
    with disabled(model):
        print("base:", answer(model, tokenizer, tokens))


def answer(model, tokenizer, tokens: torch.Tensor) -> str:
    output = model.generate(tokens, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return repr(tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
