"""What an adapter is worth on another base than its own: the base alone, the source as it is, and the rebased one.

All three are measured against the source on the base that it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mapconv.fidelity.metrics import ModelNumbers, Sums, add_all
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.running import load_base
from mapconv.runtime.adapters import without_adapters
from mapconv.runtime.models import attach_with_peft, forward_pass, is_causal
from mapconv.runtime.progress import progress_bar
from mapconv.runtime.widening import WideBlocks, blocks_of

#: In nats. Two float32 forward passes of one function differ by 1e-6 in a logit, and by its square in the divergence;
#: this leaves room for the sums of a large vocabulary.
ROUNDING = 1e-8


@dataclass(frozen=True)
class ServedNumbers:
    """Each model against the source on its own base, over ``positions`` of unseen text.

    ``alone``: the other base without any adapter; ``as_is``: with the source put on it unchanged; ``rebased``: with the
    result. ``source`` is the source itself, for its perplexity.
    """

    positions: int
    source: ModelNumbers
    alone: ModelNumbers
    as_is: ModelNumbers
    rebased: ModelNumbers

    @property
    def is_worse(self) -> bool:
        """Whether the rebased adapter is further from the source than the source as it is, beyond rounding."""
        return self.rebased.kl > self.as_is.kl + ROUNDING

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"is_worse": self.is_worse}


@torch.inference_mode()
def measure_served(
    source: PlacedAdapter,
    served: PlacedAdapter,
    result: Path,
    rows: Sequence[list[int]],
    *,
    device: torch.device,
    dtype: str = "float32",
    quiet: bool = True,
) -> ServedNumbers | None:
    """Run the source on its own base, and the other base in its three states, on sequences of token ids.

    Both bases are in memory side by side: to compute in float32, in the dtype in which they are stored, and widened
    block by block.

    Returns:
        the numbers, or None for a model that has no logits.
    """
    own = _model(source, {"source": source.adapter.path}, device, dtype)
    other = _model(served, {"as_is": served.adapter.path, "rebased": result}, device, dtype)
    causal = is_causal(own.get_base_model())
    sums = {name: Sums() for name in ("source", "alone", "as_is", "rebased")}
    with progress_bar(len(rows), "measuring", unit="sequence", quiet=quiet) as advance:
        # One at a time, because the logits of four models are in memory.
        for row in rows:
            tokens = torch.tensor([row], device=device)
            wanted = _logits(own, tokens)
            if wanted is None:
                return None
            logits = [wanted]
            with without_adapters(other):
                logits.append(_some_logits(other, tokens))
            for name in ("as_is", "rebased"):
                other.set_adapter(name)
                logits.append(_some_logits(other, tokens))
            # The last position of a causal model predicts nothing that is known.
            targets = tokens[0, 1:] if causal else None
            each = [values if targets is None else values[: len(targets)] for values in logits]
            add_all(list(sums.values()), each[0], each, targets)
            advance(1)
    means = {name: total.means(causal=causal) for name, total in sums.items()}
    return ServedNumbers(sums["source"].positions, **means)


def _model(placed: PlacedAdapter, adapters: Mapping[str, Path], device: torch.device, dtype: str) -> Any:
    """The base with adapters by name, which computes in ``dtype``."""
    wide = dtype == "float32"
    model = load_base(placed, dtype=None if wide else dtype, device=device)
    if wide:
        # PEFT holds what an adapter brings whole in the dtype of what it replaces.
        for parameter in {item.parameter for item in placed.adapter.whole} & dict(
            model.named_parameters(remove_duplicate=False)
        ).keys():
            model.get_submodule(parameter.rpartition(".")[0]).float()
    for name, folder in adapters.items():
        model = attach_with_peft(model, folder, name)
    if wide:
        WideBlocks(model, blocks_of(name for name, _ in model.named_parameters()))
    return model


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """(positions, classes) of one sequence, or None."""
    logits = getattr(forward_pass(model, tokens)(), "logits", None)
    return None if logits is None else logits[0].reshape(-1, logits.shape[-1])


def _some_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = _logits(model, tokens)
    assert logits is not None  # a model of the source's class, which has them
    return logits
