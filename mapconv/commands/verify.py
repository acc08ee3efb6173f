"""Compare a result with its source as functions and weight by weight, with stock PEFT in the source's part."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.reader import TensorReader
from mapconv.devices import resolve_device
from mapconv.errors import AdapterError
from mapconv.formats import read_adapter
from mapconv.formats.peft import CONFIG_FILE
from mapconv.hub import locate_adapter, locate_base, locate_result
from mapconv.models import attach_with_peft, load_causal_lm, load_tokenizer
from mapconv.placement import place
from mapconv.progress import progress_bar
from mapconv.report.saved import check_report_place, save_report
from mapconv.text import read_text, token_blocks

DEFAULT_SAMPLES = 8
SEQUENCE_LENGTH = 256
#: Positions whose logits are compared at once, in float64: 64 × 256,000 tokens take 131 MB.
_POSITIONS = 64


@dataclass(frozen=True)
class ModuleError:
    """``error`` = ‖W_result − W_source‖ / ‖W_source − W0‖, with both weights as stock PEFT merges them."""

    path: str
    error: float


@dataclass(frozen=True)
class VerifyReport:
    """How far a result is from its source, on ``tokens`` predicted tokens.

    ``kl`` is the mean KL(source ‖ result) in nats per token; ``kl_base`` is KL(source ‖ base), which says how much
    there was to preserve.
    """

    result: Path
    source: Path
    base: Path
    tokens: int
    kl: float
    kl_largest: float
    kl_base: float
    top1_agreement: float
    largest_logit_difference: float
    perplexity_base: float
    perplexity_source: float
    perplexity_result: float
    modules: tuple[ModuleError, ...]
    seconds: float

    @property
    def worst_module(self) -> ModuleError:
        return max(self.modules, key=lambda module: module.error)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {name: str(getattr(self, name)) for name in ("result", "source", "base")}


def verify(
    result: str | Path,
    against: str | Path,
    *,
    base: str | Path | None = None,
    data: str | Path | None = None,
    samples: int = DEFAULT_SAMPLES,
    device: str = "auto",
    dtype: str = "float32",
    save: bool = False,
    allow_pickle: bool = False,
    quiet: bool = True,
) -> VerifyReport:
    """Run a result and its source on the same text, and compare their weights.

    Args:
        result: a MAP directory (or any PEFT adapter), or a merged model.
        against: the LoRA or DoRA adapter that it was made from.
        base: the base model's folder or Hub id; None takes it from the source's configuration.
        data: a text file; None uses the text that ships with mapconv.
        samples: blocks of 256 tokens to run.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: what the models compute in; float32 shows the conversion's error alone.
        save: store the report as ``verify.json`` in the result's folder, for the model card that ``push`` writes.
        allow_pickle: read the source's weights from a ``.bin`` file.
        quiet: no progress bar.

    Raises:
        MapconvError: a model, an adapter or the text cannot be used.
    """
    started = time.perf_counter()
    result, against = locate_result(result), locate_adapter(against, allow_pickle=allow_pickle)
    if save:
        check_report_place(result)
    source = read_adapter(against, allow_pickle=allow_pickle)
    folder = locate_base(base, source.base, source.revision, against)
    text = read_text(None if data is None else Path(data))
    blocks = token_blocks(load_tokenizer(folder), text, samples=samples, length=SEQUENCE_LENGTH)
    compared = _Compared(result, against, folder, dtype=dtype, device=resolve_device(device))
    total = _Totals()
    with progress_bar(len(blocks), "verifying", unit="block", quiet=quiet) as advance, torch.inference_mode():
        for block in blocks:
            total.add(*compared.logits(block), block)
            advance(1)
        modules = tuple(compared.module_errors())
    report = VerifyReport(
        result=result,
        source=against,
        base=folder,
        tokens=total.tokens,
        kl=total.kl / total.tokens,
        kl_largest=total.kl_largest,
        kl_base=total.kl_base / total.tokens,
        top1_agreement=total.agreements / total.tokens,
        largest_logit_difference=total.logit_difference,
        perplexity_base=math.exp(total.loss_base / total.tokens),
        perplexity_source=math.exp(total.loss_source / total.tokens),
        perplexity_result=math.exp(total.loss_result / total.tokens),
        modules=modules,
        seconds=time.perf_counter() - started,
    )
    if save:
        save_report(result, report.to_dict())
    return report


class _Compared:
    """The source on its base in stock PEFT, and beside it the result: a second adapter, or a model of its own."""

    def __init__(self, result: Path, source: Path, base: Path, *, dtype: str, device: torch.device) -> None:
        self._device = device
        self._result_folder = result
        self._is_adapter = (result / CONFIG_FILE).is_file()
        if not self._is_adapter:
            # Headers first: a broken result should not cost the loading of two models.
            self._checkpoint = read_checkpoint(result)
            self._merged = load_causal_lm(result, dtype=dtype, device=device)
        self._model = attach_with_peft(load_causal_lm(base, dtype=dtype, device=device), source, "source")
        if self._is_adapter:
            self._model = attach_with_peft(self._model, result, "result")

    def logits(self, block: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (positions, vocabulary) of base, source and result."""
        tokens = torch.tensor([block], device=self._device)
        with self._model.disable_adapter():
            base = self._model(tokens).logits[0]
        self._model.set_adapter("source")
        source = self._model(tokens).logits[0]
        if not self._is_adapter:
            return base, source, self._merged(tokens).logits[0]
        self._model.set_adapter("result")
        return base, source, self._model(tokens).logits[0]

    def module_errors(self) -> Iterator[ModuleError]:
        from peft.tuners.lora import LoraLayer

        layers = {
            name.removeprefix("base_model.model."): layer
            for name, layer in self._model.named_modules()
            if isinstance(layer, LoraLayer)
        }
        if not layers:
            raise AdapterError(f"{self._result_folder}: stock PEFT finds no LoRA layer in the source.")
        merged_weight = self._merged_weights(layers)
        for path, layer in layers.items():
            base = layer.get_base_layer().weight.detach().clone()
            source = _merged_by_peft(layer, "source", base) if "source" in layer.lora_A else base
            if self._is_adapter:
                result = _merged_by_peft(layer, "result", base) if "result" in layer.lora_A else base
            else:
                result = merged_weight(path)
            change = float((source.double() - base.double()).norm())
            difference = float((result.double() - source.double()).norm())
            yield ModuleError(path, difference / change if change else difference)

    def _merged_weights(self, layers: dict[str, Any]):
        """A function from a module's path to its weight in the merged checkpoint, read from the bytes on disk."""
        if self._is_adapter:
            return None
        shapes = {path: tuple(layer.get_base_layer().weight.shape) for path, layer in layers.items()}
        names, _ = place(shapes, {name: ref.shape for name, ref in self._checkpoint.tensors.items()})

        def read(path: str) -> torch.Tensor:
            with TensorReader() as reader:
                return reader.read(self._checkpoint.tensors[names[path]]).to(self._device)

        return read


def _merged_by_peft(layer: Any, adapter: str, base: torch.Tensor) -> torch.Tensor:
    """The layer's weight with one adapter merged by PEFT's own code; the layer is left as it was."""
    weight = layer.get_base_layer().weight
    layer.merge(adapter_names=[adapter])
    merged = weight.detach().clone()
    layer.unmerge()
    weight.data.copy_(base)  # unmerging subtracts, which leaves rounding behind
    return merged


@dataclass
class _Totals:
    tokens: int = 0
    kl: float = 0.0
    kl_largest: float = 0.0
    kl_base: float = 0.0
    agreements: int = 0
    logit_difference: float = 0.0
    loss_base: float = 0.0
    loss_source: float = 0.0
    loss_result: float = 0.0

    def add(self, base: torch.Tensor, source: torch.Tensor, result: torch.Tensor, block: list[int]) -> None:
        """Count one block; the last position predicts nothing that is known."""
        targets = torch.tensor(block[1:], device=source.device)[:, None]
        for start in range(0, len(targets), _POSITIONS):
            part = slice(start, min(start + _POSITIONS, len(targets)))
            parts = (logits[part].double() for logits in (base, source, result))
            log_base, log_source, log_result = (logits.log_softmax(-1) for logits in parts)
            kl = _kl(log_source, log_result)
            self.tokens += len(kl)
            self.kl += float(kl.sum())
            self.kl_largest = max(self.kl_largest, float(kl.max()))
            self.kl_base += float(_kl(log_source, log_base).sum())
            self.agreements += int((log_source.argmax(-1) == log_result.argmax(-1)).sum())
            difference = (source[part].double() - result[part].double()).abs().max()
            self.logit_difference = max(self.logit_difference, float(difference))
            self.loss_base -= float(log_base.gather(1, targets[part]).sum())
            self.loss_source -= float(log_source.gather(1, targets[part]).sum())
            self.loss_result -= float(log_result.gather(1, targets[part]).sum())


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of each row, (positions,)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
