"""Adapters of every method that the installed PEFT has, on one tiny model for each kind of layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model

from mapconv.formats.methods import METHODS, WHOLE_METHODS

from .bases import copy_of
from .inputs import text
from .models import MODELS
from .sizes import DECODER
from .tiny import Tiny

#: A decoder whose attention has biases, which some methods change.
LLAMA = Tiny(
    "llama-biased",
    "LlamaForCausalLM",
    "LlamaConfig",
    DECODER | {"tie_word_embeddings": False, "attention_bias": True, "num_hidden_layers": 1},
    "AutoModelForCausalLM",
    text,
    {},
)
TARGETS: Mapping[str, tuple[Tiny, list[str]]] = {
    "Linear": (LLAMA, ["q_proj", "o_proj", "down_proj"]),
    "Conv1D": (MODELS["gpt2"], ["c_attn", "mlp.c_proj"]),
    "Conv2d": (MODELS["vit"], ["projection"]),
    "Embedding": (LLAMA, ["embed_tokens"]),
}
#: What a method is configured with besides its targets, so that it fits the tiny layers.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "total_step": 10},
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "BEFT": {"target_modules": ["q_proj", "v_proj"]},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "DEFT": {"r": 4},
    "FOURIERFT": {"n_frequency": 10},
    "GRALORA": {"r": 4, "gralora_k": 2, "hybrid_r": 2},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": {"r": 3, "rank_pattern": {"layers.0.*q_proj": 2}, "alpha_pattern": {"o_proj": 5}},
    "LOKR": {"r": 3, "decompose_both": True},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "OSF": {"effective_rank": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 5]},
    "UNILORA": {"r": 2, "theta_d_length": 20, "save_indices": True},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 4},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 10},
}
#: Layers besides nn.Linear, and the methods that PEFT has for them, and merges.
FURTHER: Mapping[str, tuple[str, ...]] = {
    "Conv1D": (
        *("ADALORA", "DEFT", "FOURIERFT", "FROD", "GRALORA", "HIRA", "IA3", "PVERA", "RANDLORA", "TINYLORA"),
        *("UNILORA", "VBLORA", "VERA", "WAVEFT"),
    ),
    "Conv2d": ("BOFT", "HIRA", "HRA", "LOHA", "LOKR", "OFT"),
    "Embedding": ("HIRA", "OFT", "TINYLORA"),
}
#: Settings that change what a method's tensors mean.
VARIANTS = (
    ("VERA", {"save_projection": False}),
    ("VBLORA", {"save_only_topk_weights": True}),
    ("MISS", {"init_weights": "bat"}),
    ("LOKR", {"decompose_factor": 2}),
    ("SUPERTUNING", {"r": 2}),
    ("OFT", {"block_share": True}),
)


@dataclass(frozen=True)
class MethodCase:
    """A method on a kind of layer."""

    method: str
    kind: str
    variant: Mapping[str, Any]

    @property
    def name(self) -> str:
        return "-".join([self.method.lower(), self.kind.lower(), *self.variant])

    @property
    def tiny(self) -> Tiny:
        return TARGETS[self.kind][0]

    def make(self, base: Path, adapter: Path) -> dict[str, torch.Tensor]:
        """Save an adapter that changes something, and return the state that stock PEFT merges it to on that base."""
        settings = {"target_modules": TARGETS[self.kind][1]} | SETTINGS.get(self.method, {}) | dict(self.variant)
        if self.kind != "Linear":
            settings |= {"target_modules": TARGETS[self.kind][1]}
            settings.pop("feedforward_modules", None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(20)
            config = PeftConfig.from_peft_type(peft_type=self.method, **settings)
            if hasattr(config, "progressbar"):
                config.progressbar = False
            model = get_peft_model(copy_of(self.tiny, base), config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.15 * torch.randn(parameter.shape))
            model.save_pretrained(adapter)
            return merged_by_peft(self.tiny, base, adapter)


CASES = [
    *(MethodCase(method, "Linear", {}) for method in (*METHODS, *WHOLE_METHODS)),
    *(MethodCase(method, kind, {}) for kind, methods in FURTHER.items() for method in methods),
    *(MethodCase(method, "Linear", variant) for method, variant in VARIANTS),
]


def merged_by_peft(tiny: Tiny, base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The state of a base that stock PEFT has merged an adapter from disk into."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(copy_of(tiny, base), str(adapter))
        return model.merge_and_unload().state_dict()


def model_folder(tiny: Tiny, folder: Path) -> Path:
    """The tiny model on disk."""
    if not folder.exists():
        tiny.build().save_pretrained(folder)
    return folder
