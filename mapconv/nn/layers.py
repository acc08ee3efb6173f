"""The model's layers with MAP updates on them: ``y = a·W0x + b·B(Ax) + bias``, one layer class for each kind.

A ``MapLayer`` holds the model's own module as ``base_layer`` and any number of named updates, of which one or none is
active: one copy of the base weights serves them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mapconv.algebra.dora import merge_rows_
from mapconv.nn.bases import kind_of, matrix
from mapconv.nn.dora import DoraUpdate
from mapconv.nn.functions import MapLinear, Scale
from mapconv.nn.methods import MethodUpdate
from mapconv.nn.trained_linear import TrainedLinear
from mapconv.nn.updates import Update


class MapLayer(nn.Module):
    """A layer of the model, and the MAP updates that it can run with."""

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        # A layer of a kind in LAYERS; its attributes differ by kind.
        self.base_layer: Any = base_layer
        self.path = path
        self.updates = nn.ModuleDict()
        self.active: str | None = None
        #: The base's own weight while an update is merged into it (``merge_adapter``).
        self.unmerged_weight: nn.Parameter | None = None
        self.training = base_layer.training

    # What other code asks the model's own layer for

    @property
    def owner(self) -> Any:
        """The model's own module whose ``parameter`` is adapted."""
        return self.base_layer

    @property
    def parameter(self) -> str:
        return "weight"

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.base_layer, "bias", None)

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    @property
    def num_embeddings(self) -> int:
        return self.base_layer.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.base_layer.embedding_dim

    @property
    def padding_idx(self) -> int | None:
        return self.base_layer.padding_idx

    # Updates and their scalars

    def update(self, name: str) -> Update:
        """The update of one adapter."""
        # torch's ModuleDict cannot say what modules it holds.
        return self.updates[name]  # pyright: ignore[reportReturnType]

    def alpha(self, name: str) -> float:
        """α of one update, in the unit of the weights."""
        return self.update(name).alpha()

    def beta(self, name: str) -> float:
        """β of one update, in the unit of the weights."""
        return self.update(name).beta(self.base_layer, self.path)

    def gains(self, name: str) -> tuple[float, float]:
        """(a, b): what W0 and the stored direction are multiplied by."""
        a, b = self.update(name).gains()
        return float(a.detach()), float(b.detach())

    @property
    def is_merged(self) -> bool:
        return self.unmerged_weight is not None

    def unmerge(self) -> None:
        """Put the base's own weight back where an update is merged into it."""
        if self.unmerged_weight is not None:
            self.owner._parameters[self.parameter] = self.unmerged_weight
            self.unmerged_weight = None

    def merged_weight(self, update: Update, dtype: torch.dtype) -> torch.Tensor:
        """W' as the layer stores its weight, computed in ``dtype``."""
        base = self.base_layer
        weight = base.weight.detach()
        if isinstance(update, MethodUpdate):
            return update.merged(weight, dtype)
        rows = matrix(base, weight).to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
        a, b = (float(gain.detach()) for gain in update.gains())
        A, B, magnitude = update.A.to(dtype), update.B.to(dtype), getattr(update, "magnitude", None)
        merge_rows_(rows, A, B, base_gain=a, update_gain=b, magnitude=magnitude)
        stored = rows.t() if kind_of(base) in ("transposed", "embedding") else rows
        return stored.reshape(weight.shape)

    # Running

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.active is None or self.is_merged:
            return self.base_layer(x)
        update = self.update(self.active)
        if isinstance(update, MethodUpdate):
            return update.run(self.base_layer, x)
        return self._dora(x, update) if isinstance(update, DoraUpdate) else self._low_rank(x, update)

    def _low_rank(self, x: torch.Tensor, update: Update) -> torch.Tensor:
        a, b = update.gains()
        y = self._scaled_base(x, a)
        # The gain goes on B, in float32: ``MapLinear`` says why.
        return y + self._expand(self._project(x, update.A, y), Scale.apply(update.B, b))

    def _dora(self, x: torch.Tensor, update: DoraUpdate) -> torch.Tensor:
        a, b = update.gains()
        row_gains = b * update.scales(self.base_layer, self.path)
        bias = self._bias(x)
        y = self.base_layer(x) if bias is None else self.base_layer(x) - bias
        # The row gains are near 1, and a dtype that is too coarse for 1 + δ still holds δ.
        excess = self._channels(a - b + row_gains - 1).to(y.dtype)
        projected = self._project(x, update.A, y)
        y = torch.addcmul(y, y, excess) + self._expand(projected, row_gains[:, None] * update.B)
        return y if bias is None else y + bias

    def _scaled_base(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """a·W0x + bias: the gain goes on x, so that the bias stays what it is."""
        return self.base_layer(Scale.apply(x, gain))

    def _bias(self, x: torch.Tensor) -> torch.Tensor | None:
        """The bias in the shape that adds to an output; a layer that accelerate keeps elsewhere gives it for x = 0."""
        if self.bias is None or self.bias.device == x.device:
            return None if self.bias is None else self._channels(self.bias)
        return self.base_layer(torch.zeros_like(x)).detach()

    def _project(self, x: torch.Tensor, A: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Ax, in the dtype of the base path's output y."""
        raise NotImplementedError

    def _expand(self, projected: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _channels(self, vector: torch.Tensor) -> torch.Tensor:
        """A vector over the output's channels, (out,), in the shape that multiplies an output."""
        return vector


class MapLinearLayer(MapLayer):
    """A Linear, or GPT-2's Conv1D that stores its weight transposed."""

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__(base_layer, path)
        self.transposed = kind_of(base_layer) == "transposed"

    def _low_rank(self, x: torch.Tensor, update: Update) -> torch.Tensor:
        base = self.base_layer
        if not _runs_as_defined(base):
            return super()._low_rank(x, update)
        weight = base.weight.t() if self.transposed else base.weight
        if _takes_numbers(x, base.weight, update):
            return TrainedLinear.apply(
                x, weight, base.bias, update.A, update.B, *update.scalars, *update.step_settings()
            )
        return MapLinear.apply(x, weight, base.bias, update.A, update.B, *update.gains(), _compute_dtype(x))

    def _project(self, x: torch.Tensor, A: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, _as(A, x))

    def _expand(self, projected: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return functional.linear(projected, _as(B, projected))


class MapConvLayer(MapLayer):
    """A convolution without groups; A and B are kept as matrices, and take the kernel's shape to run."""

    def _project(self, x: torch.Tensor, A: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        base = self.base_layer
        kernel = A.view(A.shape[0], base.in_channels, *base.kernel_size)
        return base._conv_forward(x, _as(kernel, x), None)

    def _expand(self, projected: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        dims = len(self.base_layer.kernel_size)
        convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
        return convolution(projected, _as(B.view(*B.shape, *[1] * dims), projected))

    def _channels(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.view(-1, *[1] * len(self.base_layer.kernel_size))


class MapEmbeddingLayer(MapLayer):
    """An embedding: W is its table transposed, so A (r, vocabulary) is looked up and B (d, r) multiplies."""

    def _scaled_base(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return Scale.apply(self.base_layer(x), gain)

    def _project(self, x: torch.Tensor, A: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.embedding(x, A.t()).to(y.dtype)

    def _expand(self, projected: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        y = functional.linear(projected, _as(B, projected))
        # Gemma multiplies its embedding by a constant in the forward pass, the update with it.
        scale = getattr(self.base_layer, "embed_scale", None)
        return y if scale is None else y * scale.to(y.dtype) if isinstance(scale, torch.Tensor) else y * scale


LAYERS: dict[str, type[MapLayer]] = {
    "linear": MapLinearLayer,
    "transposed": MapLinearLayer,
    "conv": MapConvLayer,
    "embedding": MapEmbeddingLayer,
}


def _runs_as_defined(base: nn.Module) -> bool:
    """Whether calling the layer is a product with its frozen weight, and nothing more.

    A quantized layer, one with hooks (accelerate's replace ``forward`` itself) or one that trains is called instead.
    """
    if "forward" in base.__dict__ or base._forward_hooks or base._forward_pre_hooks:
        return False
    from transformers.pytorch_utils import Conv1D

    own = type(base).forward
    trains = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    return (own is nn.Linear.forward or own is Conv1D.forward) and not trains


def _takes_numbers(x: torch.Tensor, weight: torch.Tensor, update: Update) -> bool:
    """Whether the step is ``TrainedLinear``'s: factors in training, everything on the CPU and of one dtype."""
    if x.device.type != "cpu" or not update.is_training() or torch.compiler.is_compiling():
        return False
    return x.dtype is weight.dtype is update.A.dtype and not torch.is_autocast_enabled("cpu")


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    if x.dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _as(factor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A float32 factor in the dtype of what it multiplies; under autocast the operation itself sees to that."""
    return factor if torch.is_autocast_enabled(values.device.type) else factor.to(values.dtype)
