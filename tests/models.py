"""Tiny models, tokenizers and adapters, made by stock transformers and stock PEFT."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.copies import Original

VOCABULARY = 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_config(**changes: Any) -> LlamaConfig:
    settings = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
        # Weights of ordinary size (1/√32), so that the logits are far from uniform.
        "initializer_range": 0.18, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaConfig(**settings | changes)


def save_base(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **save: Any) -> Path:
    """A random Llama with its tokenizer."""
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config()).to(dtype).save_pretrained(folder, **save)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, size: int = VOCABULARY) -> None:
    """A tokenizer of single characters, which needs no files from anywhere."""
    characters = "\n !\"'(),-.:;?" + "0123456789" + "abcdefghijklmnopqrstuvwxyz" + "ABCDEFGHIJKL"
    names = ["<unk>", "<s>", "</s>", *dict.fromkeys(characters)][:size]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)


def save_adapter(base: Path, out: Path, *, seed: int = 1, size: float = 0.15, **settings: Any) -> Path:
    """A LoRA or DoRA adapter on ``base``, every factor and magnitude randomised as training would."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings)
    torch.manual_seed(seed)
    model = get_peft_model(load_base(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.normal_(std=size)
            elif ".lora_magnitude_vector." in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    # Or PEFT adds a copy of lm_head where that is a target.
    model.save_pretrained(out, save_embedding_layers=False)
    return out


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model by stock transformers: a copy of what was read before, where no file has changed since."""
    files = frozenset((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(folder).iterdir())
    return _loaded(folder, dtype, files).copy()


@lru_cache(maxsize=8)
def _loaded(folder: Path, dtype: torch.dtype, files: frozenset) -> Original:
    return Original(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


def load_adapted(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The adapter on its base, by stock PEFT; ``dtype`` float64 is the oracle's."""
    model = PeftModel.from_pretrained(load_base(base, dtype), str(adapter), autocast_adapter_dtype=False)
    return model.to(dtype).eval()


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The merged model's weights, by stock PEFT in ``dtype``."""
    return load_adapted(base, adapter, dtype).merge_and_unload().state_dict()


def prompts() -> torch.Tensor:
    """(4, 64) random tokens, the same each time."""
    return torch.randint(0, VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def log_probabilities(model: Any) -> torch.Tensor:
    return model(prompts()).logits.double().log_softmax(-1)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """Mean KL(p ‖ q) in nats per token."""
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
