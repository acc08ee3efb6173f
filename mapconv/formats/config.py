"""What an ``adapter_config.json`` means: every field is honoured, inert, or refused by name.

Fields are those of PEFT 0.21's ``LoraConfig``; files of older versions lack some and carry others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapconv.errors import AdapterError, UnsupportedError

#: Fields that do not change what the saved weights mean (training, bookkeeping, or settings of another field).
_INERT = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "merge_weights"),
    }
)
#: Fields that are read below.
_HONOURED = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    }
)
#: Fields that are refused unless empty, each with the reason.
_REFUSED = {
    "fan_in_fan_out": "LoRA on transposed layers (GPT-2's Conv1D) is not supported yet",
    "lora_bias": "a LoRA with a bias of its own is not supported yet",
    "modules_to_save": "fully trained modules are not supported yet",
    "trainable_token_indices": "trained token rows are not supported yet",
    "target_parameters": "LoRA on bare parameters (stacked experts) is not supported yet",
    "layer_replication": "replicated layers are not supported yet",
    "ensure_weight_tying": "adapters of tied weights are not supported yet",
    "enable_lora": "LoRA on a part of a fused layer (PEFT 0.2's MergedLinear) has no place in today's models",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only, so it is no fixed weight",
    "arrow_config": "Arrow routes between adapters at run time, so it is no fixed weight",
    "use_qalora": "QALoRA pools the inputs of a quantized layer, so it fits no plain weight",
    "kasa_config": "KaSA replaces the base weight by a truncated one that the file does not hold",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "monteclora_config": "MonteCLoRA samples its weights at run time, so it is no fixed weight",
    "velora_config": "VeLoRA is not supported",
}
#: Initialisations that leave the base weight as it is, so that the saved factors are the whole adapter.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class LoraSettings:
    """The part of the configuration that decides what the tensors mean, and the base that they were made for."""

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: Mapping[re.Pattern[str], int]
    alpha_pattern: Mapping[re.Pattern[str], float]
    base: str | None
    revision: str | None

    def rank_of(self, path: str) -> int:
        return int(_by_pattern(self.rank_pattern, path, self.rank))

    def scaling_of(self, path: str) -> float:
        """alpha/r, or alpha/√r for rsLoRA, with this module's own alpha and rank."""
        rank, alpha = self.rank_of(path), _by_pattern(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_config(path: Path) -> dict[str, Any]:
    """The configuration as a table.

    Raises:
        AdapterError: unreadable, not JSON, or not an object.
    """
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} has no {path.name}: it is not an adapter folder.") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON ({error}): download it again.") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds {type(config).__name__}, expected an object: download it again.")
    return config


def parse_settings(config: Mapping[str, Any], path: Path) -> LoraSettings:
    """Check every field of the configuration and return those that give the tensors their meaning.

    Raises:
        UnsupportedError: a method or feature that mapconv refuses. AdapterError: a field of the wrong type.
    """
    field = _Fields(config, path)
    method = field.text("peft_type")
    if method is None:
        raise AdapterError(f"{path} has no peft_type: expected LORA.")
    if method.upper() != "LORA":
        raise UnsupportedError(f"{path} describes a {method} adapter: mapconv converts LoRA and DoRA (peft_type LORA).")
    _refuse_features(config, field)
    return LoraSettings(
        rank=field.rank("r", config.get("r", 8)),
        alpha=field.number("lora_alpha", config.get("lora_alpha", 8)),
        use_rslora=field.flag("use_rslora"),
        use_dora=field.flag("use_dora"),
        rank_pattern=field.pattern("rank_pattern", field.rank),
        alpha_pattern=field.pattern("alpha_pattern", field.number),
        base=field.text("base_model_name_or_path") or None,
        revision=field.text("revision") or None,
    )


def _refuse_features(config: Mapping[str, Any], field: _Fields) -> None:
    for name, value in config.items():
        if name in _INERT or name in _HONOURED or _is_empty(value):
            continue
        if name == "bias":
            if value != "none":
                raise UnsupportedError(f"{field.path}: bias={value!r}: trained biases are not supported yet.")
        elif name in _REFUSED:
            raise UnsupportedError(f"{field.path}: {name}={_short(value)}: {_REFUSED[name]}.")
        else:
            raise UnsupportedError(
                f"{field.path}: {name}={_short(value)} is a field that mapconv does not know: remove it from the file "
                "if it does not change the weights."
            )
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | str | None):
        raise AdapterError(f"{field.path}: init_lora_weights is {_short(init)}, expected true, false or a name.")
    if init not in _PLAIN_INITS:
        raise UnsupportedError(
            f"{field.path}: init_lora_weights={init!r} changes the base weights in a way that the file does not "
            "record: export it as plain LoRA first (PEFT: save_pretrained(path_initial_model_for_weight_conversion=…))."
        )


class _Fields:
    """Typed access to the configuration; every error names the file and the field."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self.config, self.path = config, path

    def text(self, name: str) -> str | None:
        value = self.config.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def flag(self, name: str) -> bool:
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return bool(value)

    def rank(self, name: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            raise self._wrong(name, value, "a whole number above 0")
        return value

    def number(self, name: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool | str) else float(value)
        except (TypeError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self._wrong(name, value, "a number")
        return number

    def pattern(self, name: str, parse: Callable[[str, Any], Any]) -> dict[re.Pattern[str], Any]:
        value = self.config.get(name) or {}
        if not isinstance(value, dict):
            raise self._wrong(name, value, "a table of patterns")
        return {self._expression(name, key): parse(f"{name}[{key!r}]", item) for key, item in value.items()}

    def _expression(self, name: str, key: str) -> re.Pattern[str]:
        """A key as PEFT's ``get_pattern_key`` uses it: it must match the end of a module's path."""
        try:
            return re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(f"{self.path}: {name} has {key!r}, which is no regular expression ({error}).") from None

    def _wrong(self, name: str, value: Any, expected: str) -> AdapterError:
        return AdapterError(f"{self.path}: {name} is {_short(value)}, expected {expected}.")


def _by_pattern(patterns: Mapping[re.Pattern[str], Any], path: str, default: Any) -> Any:
    """The value of the first pattern, in file order, that matches."""
    return next((value for pattern, value in patterns.items() if pattern.match(path)), default)


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == [] or value == {}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
