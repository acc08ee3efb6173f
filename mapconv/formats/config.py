"""What an ``adapter_config.json`` means: every field is honoured, inert, or refused by name.

Fields are those of PEFT 0.21's ``LoraConfig``; files of older versions lack some and carry others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mapconv.adapter import LoraSettings
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.methods import NO_FIXED_WEIGHT
from mapconv.jsonfile import read_object
from mapconv.untrusted.patterns import PatternTable
from mapconv.untrusted.schema import shown

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
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "lora_bias"),
        *("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"),
        # What these two say shows in the tensors: how a layer stores its weight, which tied ends were trained.
        *("fan_in_fan_out", "ensure_weight_tying"),
    }
)
#: Fields that are refused unless empty, each with the reason.
REFUSED = {
    "enable_lora": "LoRA on a part of a fused layer (PEFT 0.2's MergedLinear) does not occur in today's models",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only, so it is not a fixed weight",
    "arrow_config": "Arrow routes between adapters at run time, so it is not a fixed weight",
    "use_qalora": "QALoRA pools the inputs of a quantized layer, so it cannot be applied to a plain weight",
    "kasa_config": "KaSA replaces the base weight by a truncated one that the file does not hold",
    "use_bdlora": "its factors are block-diagonal, in a special layout",
    "monteclora_config": "MonteCLoRA samples its weights at run time, so it is not a fixed weight",
    "velora_config": "VeLoRA adds projections that compress activations in the backward pass, which have no merge",
}
#: Fields of other methods that are refused unless empty, each with the reason.
REFUSED_OF_METHODS = {
    "sample_at_inference": "PVeRA then samples its weights at run time, so it is not a fixed weight",
    "target_parameters": "of PEFT's methods, only LoRA adapts parameters that are not layers of their own",
    "layer_replication": "mapconv repeats layers for LoRA and DoRA alone",
}
#: Initialisations that leave the base weight as it is, so that the saved factors are the whole adapter.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
#: Initialisations that took s·B0·A0 out of the base weight, with B0 and A0 a function of that weight alone.
_RECOMPUTED_INITS = ("pissa", "olora")
#: Those whose B0 and A0 cannot be had again from the file and the base.
CHANGED_BASE = {
    "pissa_niter_*": "took a randomized part out of the base weights, which cannot be computed again",
    "corda": "took a part out of the base weights that depends on data which the file does not hold",
    "lora_ga": "took a part out of the base weights that depends on gradients which the file does not hold",
    "loftq": "was trained on a quantized residual of the base, which is not the base that you give",
}


def read_config(path: Path) -> dict[str, Any]:
    """The configuration as a table.

    Raises:
        AdapterError: unreadable, not JSON, or not an object.
    """
    try:
        return read_object(path, AdapterError)
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} has no {path.name}: it is not an adapter folder.") from None


def parse_settings(config: Mapping[str, Any], path: Path) -> LoraSettings:
    """Check every field of the configuration and return those that give the tensors their meaning.

    Raises:
        UnsupportedError: a method or feature that mapconv refuses. AdapterError: a field of the wrong type.
    """
    field = _Fields(config, path)
    method = field.text("peft_type")
    if method is None:
        raise AdapterError(f"{path} has no peft_type: expected LORA.")
    if method.upper() in NO_FIXED_WEIGHT:
        raise UnsupportedError(
            f"{path}: peft_type is {shown(method)}, which has no merge: {NO_FIXED_WEIGHT[method.upper()]}."
        )
    if method.upper() != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {shown(method)}, a method that is unknown to mapconv.")
    _refuse_features(config, field)
    for name in ("task_type", "peft_version"):
        field.text(name)
    return LoraSettings(
        rank=field.rank("r", config.get("r", 8)),
        alpha=field.number("lora_alpha", config.get("lora_alpha", 8)),
        use_rslora=field.flag("use_rslora"),
        use_dora=field.flag("use_dora"),
        rank_pattern=field.pattern("rank_pattern", field.rank),
        alpha_pattern=field.pattern("alpha_pattern", field.number),
        initialization=_initialization(config, path),
        modules_to_save=field.names("modules_to_save"),
        target_parameters=field.names("target_parameters"),
        token_rows=field.token_rows("trainable_token_indices"),
        layer_replication=field.ranges("layer_replication"),
        base=field.text("base_model_name_or_path") or None,
        revision=field.text("revision") or None,
    )


def parse_shared_settings(config: Mapping[str, Any], path: Path) -> LoraSettings:
    """The settings that methods besides LoRA have as well; what is a method's own, PEFT reads (``mapconv.tuners``).

    Raises:
        UnsupportedError: a feature that mapconv refuses. AdapterError: a field of the wrong type.
    """
    field = _Fields(config, path)
    for name, reason in (REFUSED | REFUSED_OF_METHODS).items():
        if not _is_empty(config.get(name)):
            raise UnsupportedError(f"{path}: {name}={shown(config[name])}: {reason}.")
    for name in ("task_type", "peft_version"):
        field.text(name)
    rows = field.token_rows("trainable_token_indices")
    if config.get("token_indices") is not None:  # a method of its own
        targets = config.get("target_modules")
        named = [targets] if isinstance(targets, str) else list(field.names("target_modules"))
        rows = dict.fromkeys(named or [""], field.token_rows("token_indices")[""])
    return LoraSettings(
        rank=1,
        alpha=1.0,
        use_rslora=False,
        use_dora=False,
        rank_pattern=PatternTable({}, ""),
        alpha_pattern=PatternTable({}, ""),
        initialization=None,
        modules_to_save=field.names("modules_to_save"),
        target_parameters=(),
        token_rows=rows,
        layer_replication=(),
        base=field.text("base_model_name_or_path") or None,
        revision=field.text("revision") or None,
    )


def _refuse_features(config: Mapping[str, Any], field: _Fields) -> None:
    for name, value in config.items():
        if name in _INERT or name in _HONOURED or _is_empty(value):
            continue
        if name in REFUSED:
            raise UnsupportedError(f"{field.path}: {name}={shown(value)}: {REFUSED[name]}.")
        else:
            raise UnsupportedError(
                f"{field.path}: {name}={shown(value)} is a field unknown to mapconv: remove it from the file "
                "if it does not change the weights."
            )


def _initialization(config: Mapping[str, Any], path: Path) -> str | None:
    """The initialization that took a low-rank part out of the base weight, if one did."""
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | str | None):
        raise AdapterError(f"{path}: init_lora_weights is {shown(init)}, expected true, false or a name.")
    if init in _PLAIN_INITS:
        return None
    if init in _RECOMPUTED_INITS:
        return init
    name = init.partition("_niter_")[0] + "_niter_*" if "_niter_" in init else init
    reason = CHANGED_BASE.get(name, "is an initialization unknown to mapconv")
    raise UnsupportedError(
        f"{path}: init_lora_weights={init!r} {reason}: export it as plain LoRA first "
        "(PEFT: save_pretrained(path_initial_model_for_weight_conversion=…))."
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

    def pattern(self, name: str, parse: Callable[[str, Any], Any]) -> PatternTable[Any]:
        value = self.config.get(name) or {}
        if not isinstance(value, dict):
            raise self._wrong(name, value, "a table of patterns")
        entries = {key: parse(f"{name}[{key!r}]", item) for key, item in value.items()}
        return PatternTable(entries, f"{self.path}: {name}")

    def names(self, name: str) -> tuple[str, ...]:
        value = self.config.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, "a list of names")
        return tuple(value)

    def token_rows(self, name: str) -> dict[str, tuple[int, ...]]:
        """Indices by the name of the embedding; a bare list means the input embedding, named ``""`` here."""
        value = self.config.get(name) or {}
        table = {"": value} if isinstance(value, list) else value
        if not isinstance(table, dict):
            raise self._wrong(name, value, "a list of token indices, or a table of such lists")
        for rows in table.values():
            if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
                raise self._wrong(name, value, "a list of token indices, or a table of such lists")
        return {key: tuple(rows) for key, rows in table.items()}

    def ranges(self, name: str) -> tuple[tuple[int, int], ...]:
        value = self.config.get(name) or []
        good = isinstance(value, list) and all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(end) is int for end in pair)
            and 0 <= pair[0] < pair[1]
            for pair in value
        )
        if not good or sum(stop - start for start, stop in value) > 10_000:
            raise self._wrong(name, value, "a list of [start, stop] layers")
        return tuple((start, stop) for start, stop in value)

    def _wrong(self, name: str, value: Any, expected: str) -> AdapterError:
        return AdapterError(f"{self.path}: {name} is {shown(value)}, expected {expected}.")


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == [] or value == {}


def names_parameter(settings: LoraSettings, parameter: str) -> bool:
    """Whether ``target_parameters`` names a parameter, by which PEFT then looks its rank up."""
    return any(f".{parameter}".endswith(f".{target}") for target in settings.target_parameters)
