"""A source and its result side by side: the adapter in stock PEFT, and the result in PEFT or as a model of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mapconv.errors import AdapterError
from mapconv.formats.peft import CONFIG_FILE, KEY_PREFIX
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.running import load_base
from mapconv.runtime.models import attach_with_peft, load_model, longest_text, reads_text, text_classes

#: Positions whose outputs are compared at once, in float64: 64 × 256,000 tokens take 131 MB.
_POSITIONS = 64


@dataclass(frozen=True)
class ModuleError:
    """``error`` = ‖W_result − W_source‖ / ‖W_source − W0‖, with both weights as stock PEFT merges them."""

    path: str
    error: float


@dataclass
class Agreement:
    """Sums over positions; a position is a predicted token, or one text for a classifier."""

    positions: int = 0
    kl: float = 0.0
    kl_largest: float = 0.0
    kl_base: float = 0.0
    agreements: int = 0
    difference: float = 0.0
    loss_base: float = 0.0
    loss_source: float = 0.0
    loss_result: float = 0.0

    def add(self, base: torch.Tensor, source: torch.Tensor, result: torch.Tensor, targets: torch.Tensor | None) -> None:
        """Count logits (positions, classes) of three models; ``targets``: the known next tokens of a causal model."""
        count = len(source) if targets is None else len(targets)
        for start in range(0, count, _POSITIONS):
            part = slice(start, min(start + _POSITIONS, count))
            log_base, log_source, log_result = (
                logits[part].double().log_softmax(-1) for logits in (base, source, result)
            )
            kl = _kl(log_source, log_result)
            self.positions += len(kl)
            self.kl += float(kl.sum())
            self.kl_largest = max(self.kl_largest, float(kl.max()))
            self.kl_base += float(_kl(log_source, log_base).sum())
            self.agreements += int((log_source.argmax(-1) == log_result.argmax(-1)).sum())
            difference = (source[part].double() - result[part].double()).abs().max()
            self.difference = max(self.difference, float(difference))
            if targets is not None:
                known = targets[part, None]
                self.loss_base -= float(log_base.gather(1, known).sum())
                self.loss_source -= float(log_source.gather(1, known).sum())
                self.loss_result -= float(log_result.gather(1, known).sum())


class Comparison:
    """The models of a verification, loaded once."""

    def __init__(self, result: Path, source: PlacedAdapter, *, dtype: str, device: torch.device) -> None:
        self._device = device
        self._is_adapter = (result / CONFIG_FILE).is_file()
        if not self._is_adapter:
            # First, because a broken result should not cost the loading of two models.
            self._merged = load_model(result, source.target.class_name, dtype=dtype, device=device)
        self._model = self._base_with(source, source.adapter.path, "source", dtype)
        base = self._model.get_base_model()
        self.is_causal = "ForCausalLM" in type(base).__name__ or "LMHead" in type(base).__name__
        if self._is_adapter and source.adapter.settings.layer_replication:
            # A second adapter would repeat the layers again: it takes a base of its own.
            self._merged = self._base_with(source, result, "result", dtype)
        elif self._is_adapter:
            self._merged = attach_with_peft(self._model, result, "result")

    def _base_with(self, source: PlacedAdapter, adapter: Path, name: str, dtype: str) -> Any:
        base = load_base(source, dtype=dtype, device=self._device)
        return attach_with_peft(base, adapter, name)

    @property
    def reads_text(self) -> bool:
        return reads_text(self._model.get_base_model())

    @property
    def longest_text(self) -> int:
        """Tokens that the model's positions allow."""
        return longest_text(self._model.get_base_model())

    @property
    def classes(self) -> dict[str, int] | None:
        """A text classifier's classes by name; None for any other model."""
        model = self._model.get_base_model()
        return text_classes(type(model).__name__, model.config)

    def logits(self, block: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Logits (positions, classes) of base, source and result on one block; None where the model has none."""
        tokens = torch.tensor([block], device=self._device)
        with self._model.disable_adapter():
            base = _run(self._model, tokens)
        if base is None:
            return None
        self._model.set_adapter("source")
        source = _run(self._model, tokens)
        if self._is_adapter:
            self._merged.set_adapter("result")
        return base, source, _run(self._merged, tokens)

    def module_errors(self) -> Iterator[ModuleError]:
        """Every adapted weight, as PEFT's own code merges it."""
        from peft.tuners.lora import LoraLayer

        layers = [item for item in self._model.named_modules() if isinstance(item[1], LoraLayer)]
        if not layers:
            raise AdapterError("stock PEFT finds no LoRA layer in the source.")
        results = dict(self._merged.named_modules())
        for name, layer in layers:
            path = name.removeprefix(KEY_PREFIX).replace(".base_layer", "")
            parameter = getattr(layer, "parameter_name", "weight")
            base = getattr(layer.get_base_layer(), parameter).detach().clone()
            source = _merged_by_peft(layer, parameter, "source", base)
            if self._is_adapter:
                result = _merged_by_peft(results[name], parameter, "result", base)
            else:
                result = self._merged.get_parameter(f"{path}.{parameter}").detach()
            change = float((source.double() - base.double()).norm())
            difference = float((result.double() - source.double()).norm())
            # Two parameters of one module (experts) need more than the module's path to tell them apart.
            path = path if parameter == "weight" else f"{path}.{parameter}"
            yield ModuleError(path, difference / change if change else difference)


def _run(model: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    inputs = {"input_ids": tokens}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    output = model(**inputs)
    logits = getattr(output, "logits", None)
    return None if logits is None else logits[0].reshape(-1, logits.shape[-1])


def _merged_by_peft(layer: Any, parameter: str, adapter: str, base: torch.Tensor) -> torch.Tensor:
    """The layer's weight with one adapter merged by PEFT's own code; the layer is left as it was."""
    if adapter not in layer.lora_A and adapter not in layer.lora_embedding_A:
        return base
    weight = getattr(layer.get_base_layer(), parameter)
    layer.merge(adapter_names=[adapter])
    merged = weight.detach().clone()
    layer.unmerge()
    weight.data.copy_(base)  # unmerging subtracts, which leaves rounding behind
    return merged


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of each row, (positions,)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
