"""What a tiny random model is: how to build it, how to feed it, and which layers it has.

A model is described by its *roles* (which module names are linear, embedding, head, convolution, …): an option says
which role it needs, so that the matrix is a product and not a list that somebody has to keep up to date.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

#: Small on purpose. Square weights and oblong ones both occur: only logits tell a square weight from its transpose.
HIDDEN, WIDE, VOCAB, LENGTH = 16, 24, 40, 6


@dataclass(frozen=True, eq=False)
class Tiny:
    """One model of the matrix.

    ``roles`` maps a role to the module or parameter names that play it, spelled as PEFT's ``target_modules`` wants
    them.  ``tied`` says that input and output embedding are one tensor.  ``auto`` is the class that users reload with.
    """

    name: str
    model_class: str
    config_class: str
    settings: dict[str, Any]
    auto: str
    inputs: Callable[[], dict[str, torch.Tensor]]
    roles: dict[str, tuple[str, ...]]
    tied: bool = False
    layers: str | None = None

    def build(self) -> PreTrainedModel:
        """A float32 model with random weights, biases and norms: nothing is left at zero or one."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config_class)(**self.settings)
        model = getattr(transformers, self.model_class)(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "norm" in name.lower() or "ln_" in name:
                    parameter.add_(0.1 * noise)
                else:
                    # Weights of 0.3 keep 16-wide layers far from linear and far from saturated.
                    parameter.copy_(0.3 * noise)
        model.tie_weights()
        return model.eval()

    def load(self, folder: str | Path, **options: Any) -> Any:
        """``from_pretrained`` of the class that a user would pick, in float32."""
        if "experts" in self.roles:
            # The default kernel for experts (grouped_mm) has no float64: the plain loop has.
            options["experts_implementation"] = "eager"
        return getattr(transformers, self.auto).from_pretrained(folder, dtype=torch.float32, **options)

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """The float64 logits of a fixed input; the model is widened in place."""
        return self.logits_of_wide(model.double().eval())

    def logits_of_wide(self, model: torch.nn.Module) -> torch.Tensor:
        """The same of a model that is in float64 and in eval mode already."""
        inputs = {name: value.double() if value.is_floating_point() else value for name, value in self.inputs().items()}
        with torch.no_grad():
            return model(**inputs).logits
