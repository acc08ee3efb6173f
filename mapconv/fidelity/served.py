"""What an adapter is worth on another base than its own: the base alone, the source as it is, and the rebased one.

All three are measured against the source on the base that it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mapconv.fidelity.metrics import ModelNumbers, Sums
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.running import load_base
from mapconv.runtime.models import attach_with_peft, is_causal, model_inputs
from mapconv.runtime.progress import progress_bar

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
    rows: Sequence[Sequence[int]],
    *,
    device: torch.device,
    dtype: str = "float32",
    quiet: bool = True,
) -> ServedNumbers | None:
    """Run the source on its own base, and the other base in its three states, on sequences of token ids.

    One base is in memory at a time, beside the source's logits for all sequences.

    Returns:
        the numbers, or None for a model that has no logits.
    """
    model = attach_with_peft(load_base(source, dtype=dtype, device=device), source.adapter.path, "source")
    causal = is_causal(model.get_base_model())
    wanted = []
    with progress_bar(4 * len(rows), "measuring", unit="sequence", quiet=quiet) as advance:
        for row in rows:
            logits = _logits(model, row, device)
            if logits is None:
                return None
            wanted.append(logits)
            advance(1)
        del model
        model = attach_with_peft(load_base(served, dtype=dtype, device=device), served.adapter.path, "as_is")
        model = attach_with_peft(model, result, "rebased")
        sums = {name: Sums() for name in ("source", "alone", "as_is", "rebased")}
        for row, logits in zip(rows, wanted, strict=True):
            # The last position of a causal model predicts nothing that is known.
            targets = torch.tensor(row[1:], device=device) if causal else None
            count = len(logits) if targets is None else len(targets)
            own = logits[:count]
            sums["source"].add(own, own, targets)
            with model.disable_adapter():
                sums["alone"].add(logits[:count], _some_logits(model, row, device)[:count], targets)
            advance(1)
            for name in ("as_is", "rebased"):
                model.set_adapter(name)
                sums[name].add(logits[:count], _some_logits(model, row, device)[:count], targets)
                advance(1)
    means = {name: total.means(causal=causal) for name, total in sums.items()}
    return ServedNumbers(sums["source"].positions, **means)


def _logits(model: Any, row: Sequence[int], device: torch.device) -> torch.Tensor | None:
    output = model(**model_inputs(model, torch.tensor([row], device=device)))
    logits = getattr(output, "logits", None)
    return None if logits is None else logits[0].reshape(-1, logits.shape[-1])


def _some_logits(model: Any, row: Sequence[int], device: torch.device) -> torch.Tensor:
    logits = _logits(model, row, device)
    assert logits is not None  # a model of the source's class, which has them
    return logits
