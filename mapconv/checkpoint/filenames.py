"""The files that model and adapter folders are made of, by name."""

from __future__ import annotations

MODEL_CONFIG = "config.json"
#: Written into a merged model: what it was made from. transformers leaves a file of this name alone.
MERGE_RECORD = "map_merge.json"
#: In a folder that took its place before another output that belongs to it: what that is.
AWAITING = ".mapconv-awaiting"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
MODEL_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "image_processor_config.json", "configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
#: What the weights files of a model are called, without their endings: transformers' name, and diffusers', whose half
#: precision is a variant of its own.
STEMS = ("model", "diffusion_pytorch_model", "diffusion_pytorch_model.fp16", "model.fp16")
#: What a pipeline of several diffusers models has at its top.
PIPELINE_FILE = "model_index.json"


def weights_files(stem: str) -> tuple[str, str]:
    """The names of a single weights file and of an index; diffusers puts a variant before an index's last ending."""
    name, *variant = stem.split(".")
    return f"{stem}.safetensors", ".".join([f"{name}.safetensors.index", *variant, "json"])


#: Weights as transformers, PEFT and diffusers name them, and the indexes of their shards.
WEIGHT_FILES = (
    "model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors", "adapter_model.bin",
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "diffusion_pytorch_model*.safetensors",
    "adapters.safetensors", "pytorch_lora_weights.safetensors",
)  # fmt: skip
INDEX_FILES = (*(weights_files(stem)[1] for stem in STEMS), "pytorch_model.bin.index.json")
#: Each tells what a folder is, whatever its weights are called.
RECORD_FILES = ("map_config.json", "adapter_config.json", MERGE_RECORD)
#: What an adapter is read from.
ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "map_config.json", "adapters.safetensors",
    "adapter_model.pt", "lit_model.pth.lora", "hyperparameters.yaml", "model_weights.ckpt", "model_config.yaml",
)  # fmt: skip
#: What else mapconv and PEFT write beside the weights: the card, its picture, a saved report.
COMPANION_FILES = ("README.md", "scalars.png", "verify.json")
