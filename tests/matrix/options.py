"""The options of the matrix: how PEFT is told to make each adapter, and what mapconv must do with it.

An option gives PEFT's ``LoraConfig`` arguments for a model, or None where the model lacks the layers it needs.
``merge`` says what PEFT's own ``merge_and_unload`` is worth there: ``sound`` (equal to the unmerged forward) or
``wrong`` (measured: it changes the model).  The unmerged forward is the truth, except where it is ``live-wrong``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from . import dialects
from .models import MODELS
from .recipes import (
    ROWS_ADDED,
    TOKENS,
    Settings,
    Verdict,
    both_ends,
    experts,
    linear,
    needs,
    on,
    patterns,
    plain,
    saving,
    tied_only,
    tied_wrong,
    token_ends,
    with_settings,
)
from .tiny import VOCAB, Tiny


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


_TEXT = tuple(name for name, tiny in MODELS.items() if "embedding" in tiny.roles)
_DECODERS = ("llama", "llama-tied", "qwen3", "gemma", "gemma3")
_MOE = ("mixtral", "qwen3-moe", "gpt-oss")
_VISION_TEXT = ("qwen2-vl", "llava", "paligemma", "gemma3-vl", "qwen3-vl", "idefics3")
_SPREAD = ("llama", "gpt2", "bert-classifier", "t5", "vit", "qwen2-vl", "mixtral")
#: PEFT's wrapper of a tied output layer forgets the layer's bias in its forward pass (trainable_tokens/layer.py calls
#: F.linear without one), so that an untrained adapter changes BERT's logits by exactly that bias. Its merge keeps it.
_tokens_verdict = {"bert": "live-wrong"}


OPTIONS: tuple[Option, ...] = (
    # Layers
    Option("lora", plain),
    Option("dora", with_settings(use_dora=True)),
    Option("conv-lora", on("conv")),
    Option("conv-dora", on("conv", use_dora=True)),
    Option("embedding-lora", on("embedding"), merge=tied_wrong),
    Option("embedding-dora", on("embedding", use_dora=True), merge=tied_wrong),
    Option("head-lora", on("head"), merge=tied_wrong),
    Option("head-dora", on("head", use_dora=True), merge=tied_wrong, only=("llama", "llama-tied", "gemma3", "bert")),
    Option("both-ends-lora", both_ends, merge=tied_wrong, only=("llama", "llama-tied", "gpt2", "gemma")),
    # Configuration
    Option("rslora-patterns", patterns, only=_SPREAD),
    Option("patterns-dora", lambda tiny: patterns(tiny) | {"use_dora": True}, only=_SPREAD),
    Option("regex", lambda tiny: plain(tiny) | {"target_modules": rf".*\.1\..*{linear(tiny)[0]}"}, only=_SPREAD),
    Option(
        "all-linear", with_settings(target_modules="all-linear"), only=(*_SPREAD, "qwen3-moe", "gpt-oss", "whisper")
    ),
    Option(
        "all-linear-dora",
        with_settings(target_modules="all-linear", use_dora=True),
        only=("llama", "gpt2", "bert", "vit"),
    ),
    Option(
        "layers-to-transform",
        lambda tiny: plain(tiny) | {"layers_to_transform": [1], "layers_pattern": tiny.layers},
        only=("llama", "gpt2", "bert", "t5"),
    ),
    Option(
        "exclude-modules",
        lambda tiny: plain(tiny) | {"exclude_modules": rf".*\.0\..*{linear(tiny)[0]}"},
        only=("llama", "gpt2", "vit", "qwen2-vl"),
    ),
    # The task is not a class: retrievers are trained on whole vision-language models as well as on bare ones.
    Option("feature-extraction", with_settings(task_type="FEATURE_EXTRACTION"), only=_VISION_TEXT),
    # Biases
    Option("lora-bias", on("biased", lora_bias=True)),
    Option("bias-all", needs("biased", lambda tiny, _: plain(tiny) | {"bias": "all"})),
    Option(
        "bias-all-dora",
        needs("biased", lambda tiny, _: plain(tiny) | {"bias": "all", "use_dora": True}),
        only=("gpt2", "bert", "vit", "whisper"),
    ),
    Option(
        "bias-lora-only",
        needs("biased", lambda tiny, _: plain(tiny) | {"bias": "lora_only"}),
        only=("gpt2", "bert", "distilbert-classifier", "vit", "whisper"),
    ),
    Option("bias-all-gpt-oss", with_settings(bias="all"), only=("gpt-oss",)),
    # Whole tensors
    Option("save-classifier", saving("classifier")),
    Option("save-classifier-dora", saving("classifier", use_dora=True), only=("gpt2-classifier", "vit")),
    Option(
        "classifier-bare-base",
        saving("classifier", task_type="SEQ_CLS"),
        base="bare",
        only=("gpt2-classifier", "bert-classifier", "distilbert-classifier"),
    ),
    Option("save-head", saving("head"), only=(*_DECODERS, "gpt2", "whisper", "qwen2-vl", "llava", "mixtral")),
    Option("save-embedding", saving("embedding"), only=(*_DECODERS, "gpt2", "bert-classifier", "whisper", "llava")),
    Option("save-embedding-tying", tied_only(saving("embedding", ensure_weight_tying=True)), only=_DECODERS),
    Option(
        "save-norms",
        with_settings(modules_to_save=["input_layernorm", "model.norm"]),
        only=("llama", "qwen3", "mixtral"),
    ),
    Option("save-projector", with_settings(modules_to_save=["multi_modal_projector"]), only=("llava",)),
    Option(
        "tokens",
        with_settings(trainable_token_indices=TOKENS),
        only=_TEXT,
        merge=lambda tiny: _tokens_verdict.get(tiny.name, "sound"),
    ),
    Option(
        "tokens-dora",
        with_settings(trainable_token_indices=TOKENS, use_dora=True),
        only=("llama", "llama-tied", "gpt2"),
    ),
    Option(
        "tokens-tying",
        tied_only(with_settings(trainable_token_indices=TOKENS, ensure_weight_tying=True)),
        only=("llama-tied", "gemma3"),
    ),
    Option("tokens-both-ends", token_ends, only=("llama", "llama-tied", "gemma"), merge=tied_wrong),
    Option(
        "embedding-lora-tying",
        tied_only(on("embedding", ensure_weight_tying=True)),
        merge=tied_wrong,
        only=("llama-tied", "gemma"),
    ),
    Option(
        "embedding-dora-tying",
        tied_only(on("embedding", ensure_weight_tying=True, use_dora=True)),
        merge=tied_wrong,
        only=("llama-tied", "gemma"),
    ),
    Option(
        "save-both-ends",
        lambda tiny: plain(tiny) | {"modules_to_save": ["embed_tokens", "lm_head"]},
        only=("llama-tied", "gemma"),
    ),
    Option("resized", plain, vocab=VOCAB + ROWS_ADDED, only=("llama", "llama-tied", "gemma")),
    Option(
        "resized-save-both",
        lambda tiny: plain(tiny) | {"modules_to_save": ["embed_tokens", "lm_head"]},
        vocab=VOCAB + ROWS_ADDED,
        only=("llama",),
    ),
    Option(
        "resized-tokens",
        with_settings(trainable_token_indices=[VOCAB + 1, VOCAB + 2, 5]),
        vocab=VOCAB + ROWS_ADDED,
        only=("llama", "llama-tied"),
    ),
    # Experts
    Option("experts-down", experts("down_proj")),
    Option("experts-gate-up", experts("gate_up_proj")),
    Option("experts-two", experts("gate_up_proj", "down_proj")),
    Option("experts-alone", experts("gate_up_proj", "down_proj", target_modules=[])),
    Option(
        "experts-patterns",
        experts(
            "down_proj",
            "gate_up_proj",
            use_rslora=True,
            rank_pattern={"experts.down_proj": 3},
            alpha_pattern={"experts.gate_up_proj": 5},
        ),
    ),
    Option("experts-fused-base", experts("gate_up_proj", "down_proj"), base="fused"),
    Option(
        "experts-v4",
        experts("gate_up_proj", "down_proj"),
        rewrite=dialects.version_4_experts,
        rewrite_is_source=True,
        only=("mixtral", "qwen3-moe"),
    ),
    Option(
        "router",
        lambda tiny: (
            plain(tiny) | {"target_parameters": ["router.weight" if tiny.name == "gpt-oss" else "gate.weight"]}
        ),
        only=_MOE,
    ),
    Option("experts-bias", experts("gate_up_proj_bias"), only=("gpt-oss",)),
    # Layers that the merged checkpoint must repeat
    Option(
        "replication",
        with_settings(layer_replication=[[0, 2], [1, 2]]),
        only=("llama", "llama-tied", "bert", "mixtral"),
        merge=lambda tiny: "wrong",
    ),
    Option(
        "replication-dora",
        with_settings(layer_replication=[[0, 2], [1, 2]], use_dora=True),
        only=("llama", "bert"),
        merge=lambda tiny: "wrong",
    ),
    # Initialisations. PEFT computes PiSSA's and OLoRA's residual in float32 from a float32 SVD or QR, whose singular
    # vectors carry tens of roundings themselves.
    Option("pissa", with_settings(init_lora_weights="pissa"), only=("llama", "gpt2", "bert", "t5"), slack=16),
    Option("pissa-rslora", with_settings(init_lora_weights="pissa", use_rslora=True), only=("llama",), slack=16),
    Option("pissa-dora", with_settings(init_lora_weights="pissa", use_dora=True), only=("llama", "gpt2"), slack=16),
    Option("olora", with_settings(init_lora_weights="olora"), only=("llama", "bert", "t5"), slack=16),
    Option("olora-dora", with_settings(init_lora_weights="olora", use_dora=True), only=("llama", "bert"), slack=16),
    Option("gaussian", with_settings(init_lora_weights="gaussian"), only=("llama", "vit")),
    Option("orthogonal", with_settings(init_lora_weights="orthogonal"), only=("llama", "bert")),
    Option("mica", with_settings(init_lora_weights="mica"), only=("llama", "gpt2")),
    Option("eva", with_settings(init_lora_weights="eva"), only=("llama", "t5")),
    Option("random-init", with_settings(init_lora_weights=False), only=("llama",)),
    # Spellings: the same adapter as other tools and older versions write it
    Option(
        "default-in-keys", with_settings(use_dora=True), rewrite=dialects.adapter_name_in_keys("default"), only=_SPREAD
    ),
    Option("name-in-keys", saving("embedding"), rewrite=dialects.adapter_name_in_keys("my_task"), only=("llama",)),
    Option("peft-0.3", plain, rewrite=dialects.peft_0_3, only=("llama", "gpt2", "bert-classifier", "t5")),
    Option(
        "unknown-fields",
        with_settings(use_dora=True),
        rewrite=dialects.fields_of_other_tools,
        only=("llama", "qwen2-vl"),
    ),
    Option(
        "pickle",
        with_settings(use_dora=True),
        rewrite=dialects.pickled,
        only=("llama", "gpt2"),
        extra={"allow_pickle": True},
    ),
    Option("map-authors", plain, rewrite=dialects.map_authors, only=("llama", "bert-classifier", "t5", "vit")),
    Option(
        "v4-names",
        with_settings(use_dora=True),
        rewrite=dialects.version_4_names,
        peft_reads=False,
        only=("qwen2-vl", "llava", "vit"),
    ),
    Option(
        "v4-names-save-head",
        saving("head"),
        rewrite=dialects.version_4_names,
        peft_reads=False,
        only=("qwen2-vl", "llava"),
    ),
    Option(
        "v4-names-fused-base",
        plain,
        rewrite=dialects.version_4_names,
        peft_reads=False,
        base="fused",
        only=("qwen2-vl", "llava", "vit"),
    ),
    Option(
        "fused-base",
        with_settings(use_dora=True),
        base="fused",
        only=("mixtral", "qwen3-moe", "qwen2-vl", "llava", "vit"),
    ),
    Option("bare-base", with_settings(use_dora=True), base="bare", only=("gpt2", "llama-tied", "gemma", "whisper")),
)


def combinations() -> Iterable[tuple[Tiny, Option]]:
    """Every (model, option) of the matrix, model by model: what is kept of a model serves its next case."""
    return [(tiny, option) for tiny in MODELS.values() for option in OPTIONS if option.applies(tiny)]
