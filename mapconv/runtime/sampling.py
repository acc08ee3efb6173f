"""Text that a language model writes itself: sequences sampled from its start token, where a user has no data."""

from __future__ import annotations

from typing import Any

import torch

from mapconv.errors import DataError
from mapconv.runtime.models import quiet_libraries

#: Sequences that are written together: a cache of keys and values is kept for each.
_BATCH = 16


def can_write(model: Any) -> bool:
    """Whether the model generates text by itself; classifiers and encoders do not."""
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate is not None and can_generate() and not model.config.is_encoder_decoder)


def sample_sequences(model: Any, tokenizer: Any, *, samples: int, length: int, seed: int = 0) -> list[list[int]]:
    """``samples`` sequences of ``length`` tokens, each drawn from the model's own distribution; equal for equal seeds.

    Raises:
        DataError: a model that does not generate text, or has no token to start from.
    """
    if not can_write(model):
        raise DataError(f"{type(model).__name__} does not write text: give sample text with --data.")
    start = _start_token(model, tokenizer)
    rows: list[list[int]] = []
    with quiet_libraries(), torch.inference_mode(), torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(seed)
        while len(rows) < samples:
            prompt = torch.full((min(_BATCH, samples - len(rows)), 1), start, device=model.device)
            # Neither top-k nor top-p: the moments are to be those of the model's own distribution.
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                pad_token_id=start,
            )
            rows += written.tolist()
    return rows


def _start_token(model: Any, tokenizer: Any) -> int:
    candidates = [
        getattr(tokenizer, "bos_token_id", None),
        getattr(model.config, "bos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ]
    for candidate in candidates:
        if isinstance(candidate, int):
            return candidate
    raise DataError("the tokenizer has no start token to write text from: give sample text with --data.")


def _devices(model: Any) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []
