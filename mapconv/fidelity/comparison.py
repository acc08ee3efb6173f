"""A source and its result side by side: the adapter in stock PEFT, and the result in PEFT or as a model of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mapconv.errors import AdapterError
from mapconv.fidelity.metrics import Sums, add_all
from mapconv.formats.peft import CONFIG_FILE, KEY_PREFIX
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.running import load_base, load_merged
from mapconv.runtime.adapters import without_adapters
from mapconv.runtime.models import (
    attach_with_peft,
    is_causal,
    longest_text,
    model_inputs,
    reads_text,
    text_classes,
)


@dataclass(frozen=True)
class ModuleError:
    """``error`` = ‖W_result − W_source‖ / ‖W_source − W0‖, with both weights as stock PEFT merges them."""

    path: str
    error: float


class Agreement:
    """What base and result do, against the source, on the same text."""

    def __init__(self) -> None:
        self.base, self.source, self.result = Sums(), Sums(), Sums()

    def add(self, base: torch.Tensor, source: torch.Tensor, result: torch.Tensor, targets: torch.Tensor | None) -> None:
        """Count logits (positions, classes) of three models; ``targets``: the known next tokens of a causal model."""
        count = len(source) if targets is None else len(targets)
        wanted = source[:count]
        add_all([self.base, self.source, self.result], wanted, [base[:count], wanted, result[:count]], targets)


class Comparison:
    """The models of a verification, loaded once."""

    def __init__(
        self,
        result: Path,
        source: PlacedAdapter,
        *,
        dtype: str,
        device: torch.device,
        result_base: PlacedAdapter | None = None,
        quiet: bool = True,
    ) -> None:
        """Load them.

        Args:
            result: an adapter's or a merged model's folder.
            source: the adapter that it was made from, on its base.
            dtype: what the models compute in.
            device: where they run.
            result_base: the result, an adapter, on its base; None: on the source's, whose weights they share.
            quiet: no progress bar.
        """
        self._device, self._quiet = device, quiet
        self._is_adapter = (result / CONFIG_FILE).is_file()
        if not self._is_adapter:
            # First, because a broken result should not cost the loading of two models.
            class_name = source.target.class_name
            self._merged = load_merged(result, class_name, dtype=dtype, device=device, quiet=quiet)
        self._model = self._base_with(source, source.adapter.path, "source", dtype)
        base = self._model.get_base_model()
        self.is_causal = is_causal(base)
        if result_base is not None:
            self._merged = self._base_with(result_base, result, "result", dtype)
        elif self._is_adapter and (source.adapter.settings.layer_replication or not _is_low_rank(source)):
            # A second adapter would repeat the layers again, and one of another method cannot be a second one: the
            # result takes a base of its own.
            self._merged = self._base_with(source, result, "result", dtype)
        elif self._is_adapter:
            self._merged = attach_with_peft(self._model, result, "result")

    def _base_with(self, source: PlacedAdapter, adapter: Path, name: str, dtype: str) -> Any:
        base = load_base(source, dtype=dtype, device=self._device, quiet=self._quiet)
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
        with without_adapters(self._model):
            base = run_model(self._model, tokens)
        if base is None:
            return None
        self._model.set_adapter("source")
        source = run_model(self._model, tokens)
        if self._is_adapter:
            self._merged.set_adapter("result")
        result = run_model(self._merged, tokens)
        # Models of the base's class, which has logits.
        assert source is not None
        assert result is not None
        return base, source, result

    def module_errors(self) -> Iterator[ModuleError]:
        """Every adapted weight, as PEFT's own code merges it."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [item for item in self._model.named_modules() if _adapts_weight(item[1], BaseTunerLayer)]
        if not layers:
            raise AdapterError("stock PEFT finds no adapted weight in the source.")
        results = dict(self._merged.named_modules())
        for name, layer in layers:
            path = name.removeprefix(KEY_PREFIX).replace(".base_layer", "")
            parameter = getattr(layer, "parameter_name", "weight")
            base = getattr(layer.get_base_layer(), parameter).detach().clone()
            source = merged_by_peft(layer, parameter, "source", base)
            if self._is_adapter:
                other = results[name]
                own = getattr(other.get_base_layer(), parameter).detach().clone()
                result = merged_by_peft(other, parameter, "result", own)
            else:
                result = self._merged.get_parameter(f"{path}.{parameter}").detach()
            change = float((source.double() - base.double()).norm())
            difference = float((result.double() - source.double()).norm())
            # Two parameters of one module (experts) need more than the module's path to tell them apart.
            path = path if parameter == "weight" else f"{path}.{parameter}"
            yield ModuleError(path, difference / change if change else difference)


def _is_low_rank(source: PlacedAdapter) -> bool:
    """Whether the source is a LoRA or a DoRA, of PEFT's own type for both."""
    return bool(source.modules) and all(item.module.method is None for item in source.modules)


def _adapts_weight(module: Any, kind: type) -> bool:
    """Whether PEFT made this layer around another whose weight, and not some rows of it, the adapter changes."""
    if not isinstance(module, kind) or getattr(module, "token_indices", None):
        return False
    return hasattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"))


def run_model(model: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    output = model(**model_inputs(model, tokens))
    logits = getattr(output, "logits", None)
    return None if logits is None else logits[0].reshape(-1, logits.shape[-1])


def merged_by_peft(layer: Any, parameter: str, adapter: str, base: torch.Tensor) -> torch.Tensor:
    """The layer's weight with one adapter merged by PEFT's own code; the layer is left as it was."""
    if adapter not in layer._get_available_adapters():
        return base
    weight = getattr(layer.get_base_layer(), parameter)
    layer.merge(adapter_names=[adapter])
    merged = weight.detach().clone()
    layer.unmerge()
    weight.data.copy_(base)  # unmerging subtracts, which leaves rounding behind
    return merged
