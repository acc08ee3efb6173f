"""The base, the source and the MAP adapter as three models, on one copy of the base's weights where they share it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from mapconv.data import IGNORED, Objective
from mapconv.errors import UnsupportedError
from mapconv.nn import detach, load_adapter, set_adapter
from mapconv.nn.attaching import layers_of, updates_of
from mapconv.nn.dora import DoraUpdate
from mapconv.nn.stacks import StackUpdate
from mapconv.nn.updates import Update
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.running import load_base
from mapconv.placement.skeleton import typed_model_config
from mapconv.placement.target_model import TargetModel
from mapconv.runtime.models import longest_text, quiet_libraries, stored_text_classes

#: What is trained: α and β of every weight alone, or its factors as well.
Train = Literal["scalars", "all"]
#: Of ‖Δ‖ in ‖W0‖: below it an update counts as if it were of this size, when its factors' steps are chosen.
_SMALLEST_SHARE = 0.01
SOURCE, MAP, WRITTEN = "source", "map", "written"


def target_classes(target: TargetModel) -> dict[str, int] | None:
    """The classes of a model that sorts texts; None for a causal language model.

    Raises:
        UnsupportedError: a model of another kind, whose outputs calibration cannot compare.
    """
    table = target.source_config or typed_model_config(target.folder)
    names = [target.class_name] if target.class_name else table.get("architectures") or ["CausalLM"]
    name = names[0]
    classes = stored_text_classes(name, table)
    if classes is None and not name.endswith(("CausalLM", "LMHeadModel")):
        raise UnsupportedError(
            f"{target.folder} is a {name}: calibration trains causal language models and sequence classifiers. "
            "`mapconv upgrade` and `mapconv rebase` need no training."
        )
    if classes is not None and len(classes) < 2:
        raise UnsupportedError(f"{target.folder} has one output and no classes: calibration compares distributions.")
    return classes


class CalibrationModels:
    """The models of one run; which of them computes is switched, no weight moves.

    The source runs on the base that it was trained on and all others on the one that the MAP folder is for: one model
    where the two bases are the same, else two.
    """

    def __init__(
        self,
        source: PlacedAdapter,
        served: PlacedAdapter,
        folder: Path,
        *,
        train: Train,
        hold_gain: bool,
        device: torch.device,
        classes: dict[str, int] | None,
        padding: int | None,
        check_base: bool,
        allow_pickle: bool,
    ) -> None:
        """Load the bases in float32, and attach the source to its own and the MAP folder to the one that it is for.

        Args:
            source, served: the source on its own base, and on the one that the MAP folder is for; often the same.
            folder: the MAP directory.
            train: what of it.
            hold_gain: keep α as it is, so that a plain LoRA stays one.
            device: where to.
            classes: those of a classifier; None for a causal language model.
            padding: the token that fills a classifier's texts, where its configuration names none.
            check_base: refuse a base whose norms are not those that the MAP directory records.
            allow_pickle: read the source's weights from a ``.bin`` file.

        Raises:
            MapconvError: of the kind that fits, where an adapter does not fit the base.
        """
        self._model = load_base(served, dtype="float32", device=device)
        shared = source.target.folder == served.target.folder
        self._source = self._model if shared else load_base(source, dtype="float32", device=device)
        self._device, self._classes, self._check_base = device, classes, check_base
        for model in (self._source, self._model):
            if classes is not None and model.config.pad_token_id is None:
                # By it such a model finds a text's last token.
                model.config.pad_token_id = padding
        load_adapter(self._source, source.adapter.path, name=SOURCE, allow_pickle=allow_pickle)
        load_adapter(self._model, folder, name=MAP, trainable=train, check_base=check_base)
        updates = updates_of(self._model, MAP).values()
        if hold_gain:
            for update in updates:
                update.hold_gain()
        self._sized = [(scalar, 1.0) for update in updates for scalar in update.scalars if scalar.requires_grad]
        if train == "all":
            self._sized += [(factor, _size(factor, update)) for update in updates for factor in update.factors]

    @property
    def model(self) -> Any:
        """The one that the MAP adapter is on."""
        return self._model

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter, _ in self._sized]

    def update_size(self) -> float | None:
        """The median of |β|/‖W0‖ over the MAP adapter's weights; None for the direction dora, whose β is costly."""
        layers = layers_of(self._model, MAP).values()
        sizes = [
            size
            for layer in layers
            if not isinstance(update := layer.update(MAP), DoraUpdate)
            for size in update.sizes(layer.base_layer, layer.path)
        ]
        return statistics.median(sizes) if sizes else None

    @property
    def has_stacks(self) -> bool:
        """Whether the adapter has stacked parameters, beside which no α is trained."""
        return any(isinstance(update, StackUpdate) for update in updates_of(self._model, MAP).values())

    @property
    def stores_float32(self) -> bool:
        """Whether the MAP folder's factors came in the dtype in which trained ones are written."""
        origins = [update.origin for update in updates_of(self._model, MAP).values()]
        return all(origin is not None and origin.dtype is torch.float32 for origin in origins)

    @property
    def sizes(self) -> list[float]:
        """What a step of 1 is for each trained parameter: about ‖W0‖ in its weight.

        Scalars are held in that unit. An entry of a factor that moves by a part p of the factor's own size moves the
        weight by p·β, so its unit is as much larger as the update is smaller than the weight.
        """
        return [size for _, size in self._sized]

    @property
    def longest_text(self) -> int:
        """Tokens that the model's positions allow."""
        return longest_text(self._model)

    def logits(self, name: str | None, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(positions, vocabulary or classes) of the base (None) or an adapter; a classifier's positions are texts."""
        model = self._source if name == SOURCE else self._model
        set_adapter(model, name)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        settings = {} if self._classes is not None else {"use_cache": False}
        return model(**inputs, **settings).logits.flatten(0, -2)

    def targets(self, batch: dict[str, torch.Tensor], *, by_label: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(known answer, whether the position counts), both (positions,); an unknown answer is 0.

        A classifier's texts all count, unless ``by_label`` asks for those with a known class alone.
        """
        labels = batch["labels"]
        if self._classes is None:
            # A position predicts the next token; the last one predicts nothing that is known.
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1).flatten()
        known = labels != IGNORED
        counts = known if self._classes is None or by_label else torch.ones_like(known)
        return labels.clamp_min(0), counts

    @contextmanager
    def attached(self, folder: Path) -> Iterator[None]:
        """A folder that was written, as the adapter ``WRITTEN`` inside the block."""
        load_adapter(self._model, folder, name=WRITTEN, check_base=self._check_base)
        try:
            yield
        finally:
            detach(self._model, WRITTEN)

    def autocast(self, objective: Objective) -> Any:
        """What training computes in: float32, and for a task on a GPU bfloat16.

        A distillation near its optimum drowns in bfloat16: on SmolLM2, where the KL was 2.1e-5, the rounding of the two
        forward passes made 1.2e-3 of it, and the scalars' gradient pointed away (cosine −0.5 with the one in float32).
        """
        rounds = self._device.type == "cuda" and objective == "task"
        return torch.autocast("cuda", torch.bfloat16) if rounds else nullcontext()

    def save_memory(self) -> None:
        """Keep each layer's input alone for the backward pass, and compute its inside again there.

        transformers does so in training mode, which would also switch dropout on: the source and the MAP adapter must
        be the same functions at every step, so dropout is set to nothing first.
        """
        if not getattr(self._model, "supports_gradient_checkpointing", False):
            return
        for module in self._model.modules():
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with quiet_libraries():
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._model.train()


def _size(factor: torch.Tensor, update: Update) -> float:
    """A factor's root mean square entry over β/‖W0‖, of which a value near zero says nothing."""
    size = float(factor.detach().double().square().mean().sqrt()) or 1.0
    return size / max(float(update.scalar("beta").detach().abs().mean()), _SMALLEST_SHARE)
