"""Load models, tokenizers and adapters through transformers and PEFT, quietly, with their errors in one sentence.

Code that a folder brings or names (``auto_map``, kernels of the Hub) never runs: the libraries are told so in every
call, which also keeps their question whether to run it from the user.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from logging import ERROR
from pathlib import Path
from typing import Any

import torch

from mapconv.errors import (
    CheckpointError,
    DataError,
    DependencyError,
    MapconvError,
    UnsupportedError,
    is_out_of_memory,
)
from mapconv.jsonfile import read_object
from mapconv.untrusted.patterns import require_bounded

#: Settings in which a configuration names the implementation of a part: a word of transformers, or code on the Hub.
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
#: What every call says to a library that would run code of a folder, or ask the user whether to.
_NO_CODE = {"trust_remote_code": False, "local_files_only": True}


def load_model(
    folder: Path,
    class_name: str | None = None,
    *,
    dtype: str,
    device: Any,
    config: dict[str, Any] | None = None,
    state: dict[str, torch.Tensor] | None = None,
    completed_later: bool = False,
) -> Any:
    """A model in eval mode.

    Args:
        folder: the model's folder.
        class_name: its transformers class; None: a causal language model's.
        dtype: what to load its weights as.
        device: where to.
        config: a configuration in place of the folder's, for a head or a vocabulary that an adapter brings.
        state: the weights by the names of a checkpoint, in place of the folder's; they need a ``class_name`` and a
            ``config``.
        completed_later: accept weights that the folder lacks, because an adapter brings them.

    Raises:
        CheckpointError: transformers cannot load it, had to invent weights that the folder lacks, or would run code.
    """
    _check_model_folder(folder)
    with quiet_libraries(), translated(f"the model in {folder}", CheckpointError):
        import transformers

        # Untyped: the stubs know neither the report beside the model nor that a state stands in for the folder.
        loader: Any = transformers.AutoModelForCausalLM if class_name is None else model_class(class_name)
        settings: dict[str, Any] = {}
        if config is not None:
            values = {key: value for key, value in config.items() if key != "model_type"}
            refuse_code(values, folder)
            settings["config"] = transformers.AutoConfig.for_model(config["model_type"], **values)
            settings["ignore_mismatched_sizes"] = True
        if state is not None:
            settings["state_dict"] = state
        model, report = loader.from_pretrained(
            folder if state is None else None,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            use_safetensors=True,
            **_NO_CODE,
            **settings,
        )
    for kind in () if completed_later else ("missing_keys", "mismatched_keys"):
        if report[kind]:
            raise CheckpointError(f"{folder}: transformers reports {kind} {sorted(map(str, report[kind]))[:3]}.")
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, or the one that transformers makes of the vocabulary in a GGUF file.

    Raises:
        DataError: the folder has none that transformers can load. DependencyError: transformers' reader for GGUF is
            not installed.
    """
    place, settings = folder, dict(_NO_CODE)
    if folder.suffix.lower() == ".gguf":
        if find_spec("gguf") is None:
            raise DependencyError(
                f"the tokenizer in {folder} is read with the package gguf: pip install 'mapconv[gguf]', or put the "
                "model's own tokenizer and config.json beside the file."
            )
        place, settings = folder.parent, settings | {"gguf_file": folder.name}
    with quiet_libraries(), translated(f"the tokenizer in {folder}", DataError):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(place, **settings)


def model_class(name: str) -> Any:
    """The transformers class of a model.

    Raises:
        CheckpointError: transformers has no model of that name; the name is a stranger's, and may be of anything there.
    """
    import transformers

    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(f"transformers {transformers.__version__} has no model class {name}.")
    return found


def refuse_code(config: dict[str, Any], where: Path) -> None:
    """Refuse a configuration that names code on the Hub as the implementation of a part of the model.

    Raises:
        CheckpointError: with the setting.
    """
    for key, value in config.items():
        if isinstance(value, dict) and str(key).lstrip("_") not in _IMPLEMENTATIONS:
            refuse_code(value, where)
        named = value.values() if isinstance(value, dict) else [value]
        if str(key).lstrip("_") in _IMPLEMENTATIONS and any("/" in str(name) for name in named):
            raise CheckpointError(
                f"{where}: {key} names code on the Hub ({value}), which mapconv never runs: remove it."
            )


def _check_model_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds an adapter beside the model, and transformers would attach it: move adapter_config.json "
            "and its weights to a folder of their own."
        )
    if (folder / "config.json").exists():
        refuse_code(read_object(folder / "config.json", CheckpointError), folder)


def attach_with_peft(model: Any, folder: Path, name: str) -> Any:
    """Attach an adapter with stock PEFT, under ``name``; a model that is a PeftModel already gets a second one.

    Raises:
        UnsupportedError: an adapter of another dialect, which stock PEFT does not read.
    """
    path = folder / "adapter_config.json"
    config = read_object(path, CheckpointError) if path.is_file() else {"peft_type": ""}
    # Stock PEFT passes by the fields of MAP's authors, and would run a LoRA.
    if folder.is_file() or "peft_type" not in config or config.get("use_map") or config.get("lora_use_map"):
        raise UnsupportedError(
            f"{folder} is not a PEFT adapter, and PEFT would have to run it: upgrade it without data first, and use "
            "the result."
        )
    if str(config["peft_type"]).upper().startswith("MAP_"):
        raise UnsupportedError(
            f"{folder} is MAP on another method, with scalars that no release of PEFT knows: upgrade or merge "
            "it first, and use the result."
        )
    _refuse_endless_targets(model, folder)
    with quiet_libraries(), translated(f"the adapter in {folder}", CheckpointError):
        from peft import PeftModel

        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name)
            return model.eval()
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name).eval()


def _refuse_endless_targets(model: Any, folder: Path) -> None:
    """Check what PEFT matches against each module's name with ``re``."""
    path = folder / "adapter_config.json"
    config = read_object(path, CheckpointError)
    for field in ("target_modules", "exclude_modules"):
        if isinstance(config.get(field), str):
            for name, _ in model.named_modules():
                require_bounded(config[field], name, f"{path}: {field}")


def reads_text(model: Any) -> bool:
    """Whether a model runs on token ids alone."""
    return getattr(model, "main_input_name", "input_ids") == "input_ids"


def is_causal(model: Any) -> bool:
    """Whether a model predicts each next token of a text."""
    return "ForCausalLM" in type(model).__name__ or "LMHead" in type(model).__name__


def model_inputs(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """What a model is called with for one pass over whole sequences, (sequences, length) token ids.

    Raises:
        DataError: a token that the model has no embedding of.
    """
    known, highest = vocabulary(model), int(tokens.max())
    if known is not None and highest >= known:
        raise DataError(
            f"the tokenizer gives a token {highest}, and the model has embeddings of {known} only: put the tokenizer "
            "that belongs to the model into its folder."
        )
    inputs: dict[str, Any] = {"input_ids": tokens}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    if hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def vocabulary(model: Any) -> int | None:
    """How many tokens a model has embeddings of, where it says which its embeddings are."""
    try:
        return model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        return None


def forward_pass(model: Any, tokens: torch.Tensor) -> Callable[[], Any]:
    """One pass over whole sequences, (sequences, length) token ids, to be run when it is called."""
    return lambda: model(**model_inputs(model, tokens))


def longest_text(model: Any) -> int:
    """Tokens that the model's positions allow."""
    parts = (model.config, getattr(model.config, "text_config", None))
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    limits = [getattr(part, name, None) for part in parts for name in names]
    # RoBERTa and its kin count positions from behind the padding's own.
    set_aside = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return min((limit for limit in limits if isinstance(limit, int)), default=1 << 30) - max(set_aside, default=0)


def text_classes(class_name: str, config: Any) -> dict[str, int] | None:
    """The classes of a model that sorts whole texts, numbers by name; None for any other model."""
    if not class_name.endswith("ForSequenceClassification"):
        return None
    return {str(name): int(number) for number, name in config.id2label.items()}


def stored_text_classes(class_name: str, table: dict[str, Any]) -> dict[str, int] | None:
    """The same of a model that is not loaded, from its class's name and its ``config.json``."""
    with quiet_libraries(), translated("the model's configuration", CheckpointError):
        from transformers import AutoConfig

        settings = {key: value for key, value in table.items() if key != "model_type"}
        return text_classes(class_name, AutoConfig.for_model(table["model_type"], **settings))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the loading bars and notices of transformers; its errors still arrive."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # Python forgets what every logger does wherever the level of one is set: not where it is silent already.
    loud = level != ERROR
    if loud:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if loud:
            logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def translated(what: str, kind: type[MapconvError]) -> Iterator[None]:
    """Turn whatever a library raises into one sentence of ours; the original stays as its cause."""
    try:
        yield
    except MapconvError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise kind(
                f"{what} needs Python code of its own, which mapconv never runs: give one that transformers knows."
            ) from error
        if is_out_of_memory(error):
            raise  # which says nothing of the files
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        told = " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]  # behind a colon stands what is wrong
        raise kind(f"{what} cannot be loaded ({type(error).__name__}: {told.rstrip('.')}).") from error
