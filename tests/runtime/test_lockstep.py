"""Batches through a model block by block."""

from __future__ import annotations

import os
import threading
from contextlib import closing

import pytest
import torch
from torch import nn

from mapconv.runtime.lockstep import in_lockstep, paused_at


class Chain(nn.Module):
    """Blocks one after another, the first of them twice if ``again``."""

    def __init__(self, blocks: int, *, again: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(blocks))
        self.again = again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.blocks[0](x) if self.again else x


def named_blocks(model: Chain) -> dict[str, nn.Module]:
    return {str(index): block for index, block in enumerate(model.blocks)}


def test_all_batches_leave_a_block_before_one_enters_the_next():
    model, log = Chain(3), []
    for name, block in named_blocks(model).items():
        block.register_forward_hook(lambda *_, name=name: log.append(name))
    results: dict[int, torch.Tensor] = {}
    batches = [torch.randn(2, 3) for _ in range(4)]
    passes = [lambda n=n, x=x: results.__setitem__(n, model(x)) for n, x in enumerate(batches)]
    for name in in_lockstep(named_blocks(model), passes, lambda name: None):
        log.append(f"left {name}")
    assert log == [*"0000", "left 0", *"1111", "left 1", *"2222", "left 2", "left None"]
    for number, batch in enumerate(batches):
        torch.testing.assert_close(results[number], model(batch).detach(), rtol=0, atol=0)


def test_enter_is_called_before_each_pass_through_a_block():
    model, entered = Chain(2), []
    passes = [lambda: model(torch.zeros(1, 3))] * 2
    list(in_lockstep(named_blocks(model), passes, entered.append))
    assert entered == ["0", "0", "1", "1"]


def test_a_block_that_runs_again_is_reported_once():
    model = Chain(2, again=True)
    passes = [lambda: model(torch.zeros(1, 3))] * 2
    assert list(in_lockstep(named_blocks(model), passes, lambda name: None)) == ["0", "1", None]


def test_an_error_in_a_pass_is_raised_and_nothing_is_left_behind():
    model = Chain(2)

    def broken() -> None:
        model(torch.zeros(1, 4))

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="shapes"):
        list(in_lockstep(named_blocks(model), [lambda: model(torch.zeros(1, 3)), broken], lambda name: None))
    assert threading.active_count() == before
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_no_pass_is_left_that_a_fork_would_find_ending():
    model, threads = Chain(1), set()

    def run() -> None:
        model(torch.zeros(1, 3))
        threads.add(threading.get_native_id())

    for _ in range(50):
        list(in_lockstep(named_blocks(model), [run] * 3, lambda name: None))
        assert not any(os.path.exists(f"/proc/self/task/{thread}") for thread in threads)


def test_closing_early_ends_the_passes():
    model, ran = Chain(3), []
    model.blocks[2].register_forward_pre_hook(lambda *_: ran.append(2))
    before = threading.active_count()
    passes = [lambda: model(torch.zeros(1, 3))] * 3
    with closing(in_lockstep(named_blocks(model), passes, lambda name: None)) as steps:
        assert next(steps) == "0"
        assert threading.active_count() == before + 3
    assert threading.active_count() == before
    assert ran == []
    assert not any(block._forward_hooks for block in model.blocks[:2])


def test_passes_need_no_gradients():
    model, seen = Chain(1), []
    list(in_lockstep(named_blocks(model), [lambda: seen.append(model(torch.zeros(1, 3)))], lambda name: None))
    assert not seen[0].requires_grad


def test_passes_wait_before_layers_or_behind_them():
    model, batches = Chain(3), [torch.randn(2, 3) for _ in range(2)]
    with torch.no_grad():
        middle = [model.blocks[0](batch) for batch in batches]
        for name, seen in paused_at(named_blocks(model), [lambda x=x: model(x) for x in batches], {"1"}):
            for number, (given, made) in seen.items():
                if name == "1":
                    torch.testing.assert_close(given, middle[number])
                    torch.testing.assert_close(made, model.blocks[1](given))
                else:
                    assert made is None
            if name == "2":  # before any pass runs it
                model.blocks[2].weight.zero_()
    assert [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in model.blocks] == [0, 0, 0]
