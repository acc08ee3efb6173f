"""Text that a language model writes itself, from first tokens drawn at random, where a user has no data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mapconv.errors import DataError
from mapconv.runtime.models import quiet_libraries, vocabulary
from mapconv.runtime.widening import WideBlocks, blocks_of

#: At most so many sequences are written together: a cache of keys and values is kept for each.
TOGETHER = 32
#: At 1 a small model's text soon loses its thread, and its layers' inputs differ more from those on real text: on
#: SmolLM2-135M a rebase of a LoRA ends at 1.10 times the KL of one on text of the task, and at 1.05 times with 0.8.
TEMPERATURE = 0.8


def can_write(model: Any) -> bool:
    """Whether the model generates text by itself; classifiers and encoders do not."""
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate is not None and can_generate() and not model.config.is_encoder_decoder)


def sample_sequences(model: Any, tokenizer: Any, *, samples: int, length: int, seed: int = 0) -> list[list[int]]:
    """``samples`` sequences of ``length`` tokens, sampled from the model; equal for equal seeds.

    Each begins with what the tokenizer puts before every text, and a token drawn from all ordinary ones: a model that
    begins every text alike writes texts that are too much alike, of which a refit learns less.

    Raises:
        DataError: a model that does not generate text.
    """
    if not can_write(model):
        raise DataError(f"{type(model).__name__} does not write text: give sample text with --data.")
    first, opening = torch.tensor(_ordinary_tokens(model, tokenizer)), torch.tensor(_opening(tokenizer)).long()
    rows: list[list[int]] = []
    # In float32, as every other pass; processors without arithmetic in 16 bits take twice as long for those besides.
    wide = WideBlocks(model, blocks_of(name for name, _ in model.named_modules())) if _on_cpu(model) else None
    with quiet_libraries(), torch.inference_mode(), _by_itself(model, int(first[0])), _seeded(model, seed):
        try:
            drawn = first[torch.randint(len(first), (samples,))]
            for together in drawn.tensor_split(-(-samples // TOGETHER)):
                prompt = torch.cat([opening.expand(len(together), -1), together[:, None]], dim=1)[:, :length]
                prompt, left = prompt.to(model.device), length - prompt.shape[1]
                if left:
                    shown = torch.ones_like(prompt)
                    prompt = model.generate(prompt, attention_mask=shown, min_new_tokens=left, max_new_tokens=left)
                rows += prompt.tolist()
        finally:
            if wide is not None:
                wide.close()
    return rows


def _on_cpu(model: Any) -> bool:
    return model.device.type == "cpu"


@contextmanager
def _by_itself(model: Any, padding: int) -> Iterator[None]:
    """Neither top-k nor top-p, nor what else its authors set: ``TEMPERATURE`` alone bends what it finds likely."""
    from transformers import GenerationConfig

    stored = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        eos_token_id=stored.eos_token_id,
        pad_token_id=padding,
    )
    try:
        yield
    finally:
        model.generation_config = stored


@contextmanager
def _seeded(model: Any, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[] if _on_cpu(model) else [model.device.index or 0]):
        torch.manual_seed(seed)
        yield


def _ordinary_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that stand for text, of which the model has embeddings; all that it has where none is ordinary."""
    known = range(min(len(tokenizer), vocabulary(model) or len(tokenizer)))
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return [token for token in known if token not in special] or list(known)


def _opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, such as a start token."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return next((whole[:at] for at in range(len(whole)) if whole[at : at + len(bare)] == bare), [])
