"""The fixed inputs that each family of models is fed: two short rows, one picture, a second of sound."""

from __future__ import annotations

import torch

from .tiny import LENGTH, VOCAB


def _tokens(vocab: int = VOCAB, extra: tuple[int, ...] = ()) -> torch.Tensor:
    """Two rows of token ids that include the rows which token options train (3 and 5)."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(6, vocab - 4, (2, LENGTH), generator=generator)
    ids[:, 1], ids[:, 3] = 3, 5
    return ids


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens()}


def masked_text() -> dict[str, torch.Tensor]:
    ids = _tokens()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seq2seq() -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens().flip(1)}


def speech() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"input_features": torch.randn(2, 8, 20, generator=generator), "decoder_input_ids": _tokens()}


def waveform() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 40, generator=torch.Generator().manual_seed(7))}


def image() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}


def qwen2_vl() -> dict[str, torch.Tensor]:
    """One image of 4 × 4 patches, merged 2 × 2 into four image tokens between text tokens."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.tensor([[3, 34, 36, 36, 36, 36, 35, 5, 7]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 36).long(),
        "pixel_values": torch.randn(16, 3 * 2 * 2 * 2, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def llava() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    ids = torch.tensor([[3, 36, 36, 36, 36, 5, 7]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}


def paligemma() -> dict[str, torch.Tensor]:
    """As LLaVA's, with the types of tokens by which PaliGemma sees which of them it was given."""
    fed = llava()
    return fed | {"token_type_ids": torch.zeros_like(fed["input_ids"])}


def gemma3() -> dict[str, torch.Tensor]:
    fed = llava()
    return fed | {"token_type_ids": (fed["input_ids"] == 36).long()}


def idefics3() -> dict[str, torch.Tensor]:
    """One row, one picture: four patches that are shuffled into one image token."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.tensor([[3, 36, 5, 7]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 1, 3, 8, 8, generator=generator)}
