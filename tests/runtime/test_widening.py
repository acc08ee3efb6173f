"""A model in 16 bit that computes in float32: what is widened, and what comes back."""

from __future__ import annotations

import pytest
import torch

from mapconv.runtime.widening import WideBlocks, blocks_of


class Model(torch.nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(40, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
        self.norm, self.head = torch.nn.LayerNorm(8), torch.nn.Linear(8, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize("tied", [False, True])
def test_it_computes_in_float32_and_keeps_the_embedding_narrow(tied):
    torch.manual_seed(0)
    model, tokens = Model(tied=tied).bfloat16(), torch.arange(40)[None]
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    wide = Model(tied=tied)
    wide.load_state_dict({name: value.float() for name, value in stored.items()})
    blocks = WideBlocks(model, blocks_of(name for name, _ in model.named_parameters()))
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(model(tokens), wide(tokens))
        # A pass that stops before the head widens no part of the table.
        x = model.embed(tokens)
        assert x.dtype == torch.float32
        model.layers[0](x)
        model.layers[1](x)
        assert model.embed.weight.dtype == torch.bfloat16
    blocks.close()
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name].to(value.dtype))
    assert {layer.weight.dtype for layer in model.layers} == {torch.bfloat16}
