"""The options of the matrix: how PEFT is told to make each adapter, and what mapconv must do with it.

An option gives PEFT's ``LoraConfig`` arguments for a model, or None where the model lacks the layers it needs.
``merge`` says what PEFT's own ``merge_and_unload`` is worth there: ``sound`` (equal to the unmerged forward) or
``wrong`` (measured: it changes the model).  The unmerged forward is the truth, except where it is ``live-wrong``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from . import dialects
from .models import MODELS
from .tiny import VOCAB, Tiny

Settings = dict[str, Any]
Verdict = Literal["sound", "wrong", "live-wrong"]

RANK, ALPHA = 4, 6
#: Rows that trained tokens replace, in an order that is not ascending: the saved rows follow the list.
TOKENS = [5, 3]
ROWS_ADDED = 4


@dataclass(frozen=True)
class Option:
    """One way of making an adapter."""

    name: str
    settings: Callable[[Tiny], Settings | None]
    only: tuple[str, ...] = ()
    merge: Callable[[Tiny], Verdict] = lambda tiny: "sound"
    #: Which spelling of the base checkpoint: see ``bases.py``.
    base: str = "default"
    #: Rows of the resized embeddings, where the adapter was trained after a resize.
    vocab: int | None = None
    #: Rewrites the saved folder into another tool's or another version's spelling.
    rewrite: dialects.Rewrite | None = None
    #: The rewrite makes another adapter, so the oracle is what PEFT loads afterwards.
    rewrite_is_source: bool = False
    #: Whether stock PEFT can read the rewritten folder on transformers 5.
    peft_reads: bool = True
    #: Arguments that mapconv needs on top, for instance the flag that lets it open a pickle.
    extra: Settings = field(default_factory=dict)
    #: How many times further than one rounding the result may be; each use says why.
    slack: float = 1.0

    def applies(self, tiny: Tiny) -> bool:
        return (not self.only or tiny.name in self.only) and self.settings(tiny) is not None


def linear(tiny: Tiny) -> list[str]:
    return list(tiny.roles.get("linear") or tiny.roles["conv1d_transposed"])


def _plain(tiny: Tiny) -> Settings:
    return {"target_modules": linear(tiny), "r": RANK, "lora_alpha": ALPHA}


def _with(**more: Any) -> Callable[[Tiny], Settings]:
    return lambda tiny: _plain(tiny) | more


def _needs(role: str, make: Callable[[Tiny, list[str]], Settings | None]) -> Callable[[Tiny], Settings | None]:
    """Settings that exist only for models with this role."""
    return lambda tiny: make(tiny, list(tiny.roles[role])) if role in tiny.roles else None


def _on(role: str, **more: Any) -> Callable[[Tiny], Settings | None]:
    """LoRA on the layers of one role."""
    return _needs(role, lambda tiny, names: _plain(tiny) | {"target_modules": names} | more)


def _saving(role: str, **more: Any) -> Callable[[Tiny], Settings | None]:
    """LoRA on the linear layers, and the layers of a role trained in full."""
    return _needs(role, lambda tiny, names: _plain(tiny) | {"modules_to_save": names} | more)


def _tied_wrong(tiny: Tiny) -> Verdict:
    """PEFT adds the delta of one end to the tensor that both ends share (measured: up to 100 % off)."""
    return "wrong" if tiny.tied else "sound"


def _patterns(tiny: Tiny) -> Settings:
    first, last = linear(tiny)[0], linear(tiny)[-1]
    # Two keys match layer 0's first target, and the first in the table wins. PEFT sorts the table when it saves it, so
    # the order here is alphabetical: in any other, PEFT itself cannot load what it saved.
    return _plain(tiny) | {
        "use_rslora": True,
        "rank_pattern": {rf".*\.0\..*{first}": 2, first: 3},
        "alpha_pattern": {rf".*{first}": 5, last: 9},
    }


def _tied_only(make: Callable[[Tiny], Settings | None]) -> Callable[[Tiny], Settings | None]:
    return lambda tiny: make(tiny) if tiny.tied else None


def _token_ends(tiny: Tiny) -> Settings | None:
    if "head" not in tiny.roles or "embedding" not in tiny.roles:
        return None
    rows = {tiny.roles["embedding"][0]: TOKENS, tiny.roles["head"][0]: [7]}
    return _plain(tiny) | {"trainable_token_indices": rows}


def _experts(*parameters: str, **more: Any) -> Callable[[Tiny], Settings | None]:
    names = [f"experts.{name}" for name in parameters]
    return _needs("experts", lambda tiny, _: _plain(tiny) | {"r": 2, "target_parameters": names} | more)


def _both_ends(tiny: Tiny) -> Settings | None:
    if "head" not in tiny.roles or "embedding" not in tiny.roles:
        return None
    return _plain(tiny) | {"target_modules": [*tiny.roles["embedding"], *tiny.roles["head"]]}


_TEXT = tuple(name for name, tiny in MODELS.items() if "embedding" in tiny.roles)
_DECODERS = ("llama", "llama-tied", "qwen3", "gemma", "gemma3")
_MOE = ("mixtral", "qwen3-moe", "gpt-oss")
_SPREAD = ("llama", "gpt2", "bert-classifier", "t5", "vit", "qwen2-vl", "mixtral")
#: PEFT's wrapper of a tied output layer forgets the layer's bias in its forward pass (trainable_tokens/layer.py calls
#: F.linear without one), so that an untrained adapter changes BERT's logits by exactly that bias. Its merge keeps it.
_tokens_verdict = {"bert": "live-wrong"}


OPTIONS: tuple[Option, ...] = (
    # Layers
    Option("lora", _plain),
    Option("dora", _with(use_dora=True)),
    Option("conv-lora", _on("conv")),
    Option("conv-dora", _on("conv", use_dora=True)),
    Option("embedding-lora", _on("embedding"), merge=_tied_wrong),
    Option("embedding-dora", _on("embedding", use_dora=True), merge=_tied_wrong),
    Option("head-lora", _on("head"), merge=_tied_wrong),
    Option("head-dora", _on("head", use_dora=True), merge=_tied_wrong, only=("llama", "llama-tied", "gemma3", "bert")),
    Option("both-ends-lora", _both_ends, merge=_tied_wrong, only=("llama", "llama-tied", "gpt2", "gemma")),
    # Configuration
    Option("rslora-patterns", _patterns, only=_SPREAD),
    Option("patterns-dora", lambda tiny: _patterns(tiny) | {"use_dora": True}, only=_SPREAD),
    Option("regex", lambda tiny: _plain(tiny) | {"target_modules": rf".*\.1\..*{linear(tiny)[0]}"}, only=_SPREAD),
    Option("all-linear", _with(target_modules="all-linear"), only=(*_SPREAD, "qwen3-moe", "gpt-oss", "whisper")),
    Option("all-linear-dora", _with(target_modules="all-linear", use_dora=True), only=("llama", "gpt2", "bert", "vit")),
    Option(
        "layers-to-transform",
        lambda tiny: _plain(tiny) | {"layers_to_transform": [1], "layers_pattern": tiny.layers},
        only=("llama", "gpt2", "bert", "t5"),
    ),
    Option(
        "exclude-modules",
        lambda tiny: _plain(tiny) | {"exclude_modules": rf".*\.0\..*{linear(tiny)[0]}"},
        only=("llama", "gpt2", "vit", "qwen2-vl"),
    ),
    # Biases
    Option("lora-bias", _on("biased", lora_bias=True)),
    Option("bias-all", _needs("biased", lambda tiny, _: _plain(tiny) | {"bias": "all"})),
    Option(
        "bias-all-dora",
        _needs("biased", lambda tiny, _: _plain(tiny) | {"bias": "all", "use_dora": True}),
        only=("gpt2", "bert", "vit", "whisper"),
    ),
    Option(
        "bias-lora-only",
        _needs("biased", lambda tiny, _: _plain(tiny) | {"bias": "lora_only"}),
        only=("gpt2", "bert", "distilbert-classifier", "vit", "whisper"),
    ),
    Option("bias-all-gpt-oss", _with(bias="all"), only=("gpt-oss",)),
    # Whole tensors
    Option("save-classifier", _saving("classifier")),
    Option("save-classifier-dora", _saving("classifier", use_dora=True), only=("gpt2-classifier", "vit")),
    Option(
        "classifier-bare-base",
        _saving("classifier", task_type="SEQ_CLS"),
        base="bare",
        only=("gpt2-classifier", "bert-classifier", "distilbert-classifier"),
    ),
    Option("save-head", _saving("head"), only=(*_DECODERS, "gpt2", "whisper", "qwen2-vl", "llava", "mixtral")),
    Option("save-embedding", _saving("embedding"), only=(*_DECODERS, "gpt2", "bert-classifier", "whisper", "llava")),
    Option("save-embedding-tying", _tied_only(_saving("embedding", ensure_weight_tying=True)), only=_DECODERS),
    Option("save-norms", _with(modules_to_save=["input_layernorm", "model.norm"]), only=("llama", "qwen3", "mixtral")),
    Option("save-projector", _with(modules_to_save=["multi_modal_projector"]), only=("llava",)),
    Option(
        "tokens",
        _with(trainable_token_indices=TOKENS),
        only=_TEXT,
        merge=lambda tiny: _tokens_verdict.get(tiny.name, "sound"),
    ),
    Option("tokens-dora", _with(trainable_token_indices=TOKENS, use_dora=True), only=("llama", "llama-tied", "gpt2")),
    Option(
        "tokens-tying",
        _tied_only(_with(trainable_token_indices=TOKENS, ensure_weight_tying=True)),
        only=("llama-tied", "gemma3"),
    ),
    Option("tokens-both-ends", _token_ends, only=("llama", "llama-tied", "gemma"), merge=_tied_wrong),
    Option(
        "embedding-lora-tying",
        _tied_only(_on("embedding", ensure_weight_tying=True)),
        merge=_tied_wrong,
        only=("llama-tied", "gemma"),
    ),
    Option(
        "embedding-dora-tying",
        _tied_only(_on("embedding", ensure_weight_tying=True, use_dora=True)),
        merge=_tied_wrong,
        only=("llama-tied", "gemma"),
    ),
    Option("resized", _plain, vocab=VOCAB + ROWS_ADDED, only=("llama", "llama-tied", "gemma")),
    Option(
        "resized-save-both",
        lambda tiny: _plain(tiny) | {"modules_to_save": ["embed_tokens", "lm_head"]},
        vocab=VOCAB + ROWS_ADDED,
        only=("llama",),
    ),
    Option(
        "resized-tokens",
        _with(trainable_token_indices=[VOCAB + 1, VOCAB + 2, 5]),
        vocab=VOCAB + ROWS_ADDED,
        only=("llama", "llama-tied"),
    ),
    # Experts
    Option("experts-down", _experts("down_proj")),
    Option("experts-gate-up", _experts("gate_up_proj")),
    Option("experts-two", _experts("gate_up_proj", "down_proj")),
    Option("experts-alone", _experts("gate_up_proj", "down_proj", target_modules=[])),
    Option(
        "experts-patterns",
        _experts(
            "down_proj",
            "gate_up_proj",
            use_rslora=True,
            rank_pattern={"experts.down_proj": 3},
            alpha_pattern={"experts.gate_up_proj": 5},
        ),
    ),
    Option("experts-fused-base", _experts("gate_up_proj", "down_proj"), base="fused"),
    Option(
        "experts-v4",
        _experts("gate_up_proj", "down_proj"),
        rewrite=dialects.version_4_experts,
        rewrite_is_source=True,
        only=("mixtral", "qwen3-moe"),
    ),
    Option(
        "router",
        lambda tiny: (
            _plain(tiny) | {"target_parameters": ["router.weight" if tiny.name == "gpt-oss" else "gate.weight"]}
        ),
        only=_MOE,
    ),
    Option("experts-bias", _experts("gate_up_proj_bias"), only=("gpt-oss",)),
    # Layers that the merged checkpoint must repeat
    Option(
        "replication",
        _with(layer_replication=[[0, 2], [1, 2]]),
        only=("llama", "llama-tied", "bert", "mixtral"),
        merge=lambda tiny: "wrong",
    ),
    Option(
        "replication-dora",
        _with(layer_replication=[[0, 2], [1, 2]], use_dora=True),
        only=("llama", "bert"),
        merge=lambda tiny: "wrong",
    ),
    # Initialisations. PEFT computes PiSSA's and OLoRA's residual in float32 from a float32 SVD or QR, whose singular
    # vectors carry tens of roundings themselves.
    Option("pissa", _with(init_lora_weights="pissa"), only=("llama", "gpt2", "bert", "t5"), slack=16),
    Option("pissa-rslora", _with(init_lora_weights="pissa", use_rslora=True), only=("llama",), slack=16),
    Option("pissa-dora", _with(init_lora_weights="pissa", use_dora=True), only=("llama", "gpt2"), slack=16),
    Option("olora", _with(init_lora_weights="olora"), only=("llama", "bert", "t5"), slack=16),
    Option("olora-dora", _with(init_lora_weights="olora", use_dora=True), only=("llama", "bert"), slack=16),
    Option("gaussian", _with(init_lora_weights="gaussian"), only=("llama", "vit")),
    Option("orthogonal", _with(init_lora_weights="orthogonal"), only=("llama", "bert")),
    Option("mica", _with(init_lora_weights="mica"), only=("llama", "gpt2")),
    Option("eva", _with(init_lora_weights="eva"), only=("llama", "t5")),
    Option("random-init", _with(init_lora_weights=False), only=("llama",)),
    # Spellings: the same adapter as other tools and older versions write it
    Option("default-in-keys", _with(use_dora=True), rewrite=dialects.adapter_name_in_keys("default"), only=_SPREAD),
    Option("name-in-keys", _saving("embedding"), rewrite=dialects.adapter_name_in_keys("my_task"), only=("llama",)),
    Option("peft-0.3", _plain, rewrite=dialects.peft_0_3, only=("llama", "gpt2", "bert-classifier", "t5")),
    Option("unknown-fields", _with(use_dora=True), rewrite=dialects.fields_of_other_tools, only=("llama", "qwen2-vl")),
    Option(
        "pickle", _with(use_dora=True), rewrite=dialects.pickled, only=("llama", "gpt2"), extra={"allow_pickle": True}
    ),
    Option(
        "v4-names",
        _with(use_dora=True),
        rewrite=dialects.version_4_names,
        peft_reads=False,
        only=("qwen2-vl", "llava", "vit"),
    ),
    Option(
        "v4-names-fused-base",
        _plain,
        rewrite=dialects.version_4_names,
        peft_reads=False,
        base="fused",
        only=("qwen2-vl", "llava", "vit"),
    ),
    Option("fused-base", _with(use_dora=True), base="fused", only=("mixtral", "qwen3-moe", "qwen2-vl", "llava", "vit")),
    Option("bare-base", _with(use_dora=True), base="bare", only=("gpt2", "llama-tied", "gemma", "whisper")),
)


def combinations() -> Iterable[tuple[Tiny, Option]]:
    """Every (model, option) of the matrix."""
    return [(tiny, option) for option in OPTIONS for tiny in MODELS.values() if option.applies(tiny)]
