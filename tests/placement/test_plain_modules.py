"""Adapters of plain torch modules, in folders without ``config.json``: names and shapes decide, PEFT is the oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import mapconv
from tests.matrix.oracle import attach_whole, randomise

TEXT = torch.arange(12).view(2, 6)
#: A merged weight is a few float32 roundings away from PEFT's, which sums in another order.
ROUNDING = 1e-5


class Mlp(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20, bias), nn.Linear(20, 2, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.lin0(x.repeat(1, 2)[:, :10].float() / 10).relu())


class Text(nn.Module):
    """An embedding, transformers' Conv1D (one of them square) and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.square, self.lin0 = nn.Embedding(30, 5), Conv1D(7, 5), Conv1D(7, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(self.square(self.conv1d(self.emb(x))).tanh())


class Kernels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1d, self.conv2d = nn.Conv1d(1, 4, 3), nn.Conv2d(1, 3, (2, 2))
        self.conv3d, self.grouped = nn.Conv3d(1, 2, (1, 2, 2)), nn.Conv2d(4, 4, 1, groups=2)
        self.lin0 = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1d(x.float().view(2, 1, 6) / 10)
        x = self.conv2d(x.view(2, 1, 4, 4)) + self.grouped(x.view(2, 4, 2, 2)).sum()
        return self.lin0(self.conv3d(x[:, :, :, :].reshape(2, 1, 3, 3, 3)).sum((2, 3)).reshape(2, -1).repeat(1, 2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.mha = nn.Linear(6, 8), nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin0(x.float() / 10).view(2, 1, 8)
        return self.mha(x, x, x)[0]


class Stack(nn.Module):
    """Two stacks of matrices and a single one, as parameters of a module."""

    def __init__(self, width: int, gates: bool) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, width * (2 if gates else 1), 6))
        self.down = nn.Parameter(torch.randn(3, 6, width))
        self.gate = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.einsum("ewi,bi->bew", self.up, x)[..., : self.down.shape[2]]
        return torch.einsum("be,edw,bew->bd", (x @ self.gate.T).softmax(-1), self.down, hidden)


class Experts(nn.Module):
    def __init__(self, width: int = 4, gates: bool = True) -> None:
        super().__init__()
        self.experts = Stack(width, gates)
        self.lin0 = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(self.experts(x.float() / 10))


def test_peft_adds_the_output_projection_of_attention_twice(tmp_path):
    """Why it is refused: the day that this fails, it can be placed."""
    plain, trained, *_, adapter = make(Attention, {"target_modules": ["mha"]}, tmp_path)
    factors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.mha.base_layer.out_proj.lora_{}.weight"
    update = 3 * factors[key.format("B")] @ factors[key.format("A")]
    merged = trained.merge_and_unload().mha.out_proj.weight
    torch.testing.assert_close(merged - plain.mha.out_proj.weight, 2 * update)


CASES = {
    "a-name": (Mlp, {"target_modules": "lin0"}),
    "two-linears": (Mlp, {"target_modules": ["lin0", "lin1"], "lora_alpha": 4}),
    "dora": (Mlp, {"target_modules": ["lin0", "lin1"], "use_dora": True}),
    "saved-module": (Mlp, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "saved-and-targeted": (Mlp, {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
    "biases": (Mlp, {"target_modules": ["lin0"], "bias": "all"}),
    "lora-bias": (Mlp, {"target_modules": ["lin0", "lin1"], "lora_bias": True, "lora_alpha": 32}),
    "patterns": (Mlp, {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}, "use_rslora": True}),
    "mica": (Mlp, {"target_modules": ["lin0"], "init_lora_weights": "mica", "r": 4}),
    "olora": (Mlp, {"target_modules": ["lin0"], "init_lora_weights": "olora", "r": 4}),
    "matrix-parameter": (Mlp, {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]}),
    "conv1d": (Text, {"target_modules": ["conv1d"]}),
    "conv1d-dora": (Text, {"target_modules": ["conv1d"], "use_dora": True}),
    "square-conv1d": (Text, {"target_modules": ["conv1d", "square"]}),
    "square-conv1d-alone": (Text, {"target_modules": ["square"], "use_dora": True}),
    "embedding": (Text, {"target_modules": ["emb"]}),
    "embedding-dora": (Text, {"target_modules": ["emb"], "use_dora": True}),
    "three-kinds": (Text, {"target_modules": ["emb", "conv1d", "lin0"]}),
    "token-rows": (Text, {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}}),
    "saved-embedding": (Text, {"target_modules": ["conv1d"], "modules_to_save": ["emb"]}),
    "kernel-1d": (Kernels, {"target_modules": ["conv1d"]}),
    "kernel-2d": (Kernels, {"target_modules": ["conv2d", "lin0"]}),
    "kernel-3d": (Kernels, {"target_modules": ["conv3d"]}),
    "kernel-dora": (Kernels, {"target_modules": ["conv1d", "conv2d", "conv3d"], "use_dora": True}),
    "kernel-bias": (Kernels, {"target_modules": ["conv2d", "conv3d"], "lora_bias": True, "lora_alpha": 32}),
    "one-stack": (Experts, {"target_modules": [], "target_parameters": ["experts.down"]}),
    "stacks": (Experts, {"target_modules": ["lin0"], "target_parameters": ["experts.up", "experts.down"]}),
    "stacks-and-gate": (
        Experts,
        {"target_modules": [], "target_parameters": ["experts.up", "experts.gate"], "rank_pattern": {"gate": 1}},
    ),
}


@pytest.fixture(params=CASES, ids=lambda name: name)
def case(request, tmp_path):
    build, settings = CASES[request.param]
    return make(build, settings, tmp_path)


def make(build, settings, folder: Path):
    """(untrained model, trained PEFT model, base folder, adapter folder)."""
    torch.manual_seed(1)
    plain = build().eval()
    (folder / "base").mkdir()
    save_file(plain.state_dict(), folder / "base" / "model.safetensors")
    trained = get_peft_model(copy.deepcopy(plain), LoraConfig(**{"r": 2, "lora_alpha": 6} | settings)).eval()
    randomise(trained, seed=2)
    trained.save_pretrained(folder / "adapter")
    return plain, trained, folder / "base", folder / "adapter"


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TEXT)


@pytest.mark.filterwarnings("ignore")
def test_merged_and_upgraded(case, tmp_path):
    plain, trained, base, adapter = case
    expected = outputs(trained)
    assert float((expected - outputs(plain)).abs().max()) > 1e-3
    mapconv.merge(adapter, tmp_path / "merged", base=base)
    merged = copy.deepcopy(plain)
    merged.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(outputs(merged), expected, rtol=ROUNDING, atol=ROUNDING)
    direction = "dora" if trained.peft_config["default"].use_dora else "low-rank"
    mapconv.upgrade(adapter, tmp_path / "map", base=base, direction=direction)
    again = attach_whole(copy.deepcopy(plain), tmp_path / "map")
    torch.testing.assert_close(outputs(again), expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.filterwarnings("ignore")
class TestRefusals:
    """Where names and shapes leave a choice, nothing is guessed."""

    def refuse(self, build, settings, tmp_path, match, edit=lambda base, adapter: None):
        *_, base, adapter = make(build, settings, tmp_path)
        edit(base, adapter)
        with pytest.raises(mapconv.MapconvError, match=match):
            mapconv.merge(adapter, tmp_path / "merged", base=base)
        assert not (tmp_path / "merged").exists()

    def test_grouped_convolutions(self, tmp_path):
        self.refuse(Kernels, {"target_modules": ["grouped"]}, tmp_path, "groups > 1")

    def test_multihead_attention(self, tmp_path):
        """PEFT's own forward pass is not what its file says, and a mend of it would not show in the file."""
        self.refuse(Attention, {"target_modules": ["mha", "lin0"]}, tmp_path, "mha is an nn.MultiheadAttention")

    def test_two_parameters_of_one_shape(self, tmp_path):
        targets = {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}
        self.refuse(lambda: Experts(6, gates=False), targets, tmp_path, "fits experts.down and experts.up alike")

    def test_a_square_stack(self, tmp_path):
        targets = {"target_modules": [], "target_parameters": ["experts.up"]}
        self.refuse(lambda: Experts(6, gates=False), targets, tmp_path, r"experts.up is square \(\[3, 6, 6\]\)")

    def test_a_square_weight_beside_a_contradiction(self, tmp_path):
        def edit(base, adapter):
            config = json.loads((adapter / "adapter_config.json").read_text())
            (adapter / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": False}))

        settings = {"target_modules": ["conv1d", "square"]}
        self.refuse(Text, settings, tmp_path, "square.weight is square", edit)

    def test_a_bias_that_the_layer_has_not_got(self, tmp_path):
        def edit(base, adapter):
            tensors = load_file(base / "model.safetensors")
            del tensors["lin0.bias"]
            save_file(tensors, base / "model.safetensors")

        self.refuse(Mlp, {"target_modules": ["lin0"], "lora_bias": True}, tmp_path, "has none", edit)

    def test_a_shared_tensor(self, tmp_path):
        def edit(base, adapter):
            tensors = load_file(base / "model.safetensors")
            save_file(tensors, base / "model.safetensors", metadata={"head.weight": "emb.weight"})

        self.refuse(Text, {"target_modules": ["emb"]}, tmp_path, "head.weight as well", edit)

    def test_a_head_that_the_base_has_not_got(self, tmp_path):
        def edit(base, adapter):
            tensors = load_file(base / "model.safetensors")
            save_file({k: v for k, v in tensors.items() if "lin1" not in k}, base / "model.safetensors")

        self.refuse(
            Mlp, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}, tmp_path, "no tensor lin1.weight", edit
        )
