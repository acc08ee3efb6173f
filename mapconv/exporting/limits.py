"""What a format and a server together can hold of an adapter, and what is left over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mapconv.adapter import WholeTensor
from mapconv.exporting.experts import Layout
from mapconv.exporting.formats import Format, Key
from mapconv.exporting.servers import Server
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.weights import PlacedModule


@dataclass(frozen=True)
class Limits:
    """The limits of a format, narrowed by those of a server where one is to read it."""

    format: Format
    server: Server | None
    experts: Layout | None = None

    @property
    def reader(self) -> str:
        """Who is to read the result, for messages."""
        return self.format.title if self.server is None else self.server.title

    @property
    def dora(self) -> bool:
        return self.format.dora and (self.server is None or self.server.dora)

    @property
    def one_rank(self) -> bool:
        split = self.experts not in (None, "fused")  # PEFT fuses what has one rank
        return self.format.one_rank or split or (self.server is not None and not self.server.patterns)

    def held(self, placed: PlacedAdapter) -> frozenset[Key]:
        """The modules whose factors can be written."""
        names = None if self.format.names is None else self.format.names(placed)
        return frozenset(
            item.key for item in placed.modules if self._holds(item) and (names is None or item.key in names)
        )

    def _holds(self, item: PlacedModule) -> bool:
        if item.module.embedding:
            is_dora = self.dora and item.module.magnitude is not None
            return self._both("embeddings") and (self.format.dora_embeddings or not is_dora)
        if len(item.module.lora_A.shape) > 2 and not self.format.convolutions:
            return False
        return item.experts == 1 or self._both("stacks")

    def holds_whole(self, tensor: WholeTensor) -> bool:
        """Whether a tensor that replaces the base's, or some rows of it, can be written."""
        if self.server is None or not self.format.whole:
            return self.format.whole
        return tensor.rows is None and tensor.parameter.removesuffix(".weight").endswith(self.server.saved_modules)

    def left_over(self, placed: PlacedAdapter) -> list[str]:
        """The adapter's parts that cannot be written, by name."""
        return list(dict.fromkeys(self._left_over(placed)))

    def without(self, placed: PlacedAdapter) -> PlacedAdapter:
        """The adapter without the parts that are left over; of whole tensors either all can be written, or none are."""
        held = self.held(placed)
        kept = tuple(
            replace(item, module=replace(item.module, bias=item.module.bias if self._holds_biases else None))
            for item in placed.modules
            if item.key in held
        )
        if all(map(self.holds_whole, placed.adapter.whole)):
            return replace(placed, modules=kept)
        settings = replace(placed.adapter.settings, modules_to_save=())
        adapter = replace(placed.adapter, whole=(), others={}, settings=settings)
        return replace(placed, adapter=adapter, modules=kept)

    def _left_over(self, placed: PlacedAdapter) -> Iterator[str]:
        held = self.held(placed)
        for item in placed.modules:
            if item.key not in held:
                yield item.module.path
            elif item.module.bias is not None and not self._holds_biases:
                yield f"{item.module.path}.lora_B.bias"
        if not all(map(self.holds_whole, placed.adapter.whole)):
            yield from (tensor.parameter for tensor in placed.adapter.whole)

    @property
    def _holds_biases(self) -> bool:
        return self.format.whole and self.server is None

    def _both(self, what: str) -> bool:
        return getattr(self.format, what) and (self.server is None or getattr(self.server, what))
