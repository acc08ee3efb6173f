"""Three models on one copy of the base: which positions count, and recomputation that changes nothing."""

from __future__ import annotations

import pytest
import torch

from mapconv.data import IGNORED
from mapconv.placement.adapters import place_adapter
from mapconv.training.losses import divergence
from mapconv.training.models import MAP, SOURCE, CalibrationModels
from tests.models import load_adapted, load_base, prompts


@pytest.fixture
def trio(source, closed_form):
    placed = place_adapter(source, None)
    return CalibrationModels(
        placed, placed, closed_form, train="all", hold_gain=False, device=torch.device("cpu"), classes=None,
        padding=None, check_base=True, allow_pickle=False,
    )  # fmt: skip


@pytest.fixture
def batch():
    """Four rows of which two are padded, with labels on a part of the tokens."""
    tokens, mask = prompts()[:, :12], torch.ones(4, 12, dtype=torch.int64)
    mask[2, 7:] = mask[3, 4:] = 0
    labels = torch.where((mask == 1) & (tokens % 3 > 0), tokens, IGNORED)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def test_each_model_computes_what_stock_peft_does(trio, batch, base, source, closed_form):
    expected = {None: load_base(base), SOURCE: load_adapted(base, source), MAP: load_adapted(base, closed_form)}
    real = batch["attention_mask"].flatten() == 1
    for name, model in expected.items():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
        # float32 through two layers; logits are of the size of 1.
        torch.testing.assert_close(trio.logits(name, batch)[real], logits[real], rtol=1e-4, atol=1e-4)


def test_a_position_counts_if_the_next_token_does(trio, batch):
    targets, counts = (values.view(4, 12) for values in trio.targets(batch, by_label=True))
    for row in range(4):
        for place in range(12):
            label = int(batch["labels"][row, place + 1]) if place < 11 else IGNORED
            assert bool(counts[row, place]) == (label != IGNORED)
            assert int(targets[row, place]) == max(label, 0)


def gradients(trio, batch):
    counts = trio.targets(batch, by_label=False)[1]
    with torch.no_grad():
        source = trio.logits(SOURCE, batch)
    for parameter in trio.trained:
        parameter.grad = None
    loss = divergence(trio.logits(MAP, batch), source, counts / counts.sum())
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in trio.trained)]


def test_recomputing_layers_changes_no_gradient_and_no_dropout(trio, batch):
    """What a GPU's run does to save memory."""
    plain = gradients(trio, batch)
    trio.model.model.layers[0].self_attn.attention_dropout = 0.5
    trio.model.config.attention_dropout = 0.5
    trio.save_memory()
    assert trio.model.training
    assert trio.model.is_gradient_checkpointing
    for found, expected in zip(gradients(trio, batch), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
