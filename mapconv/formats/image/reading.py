"""Read one weights file of an image adapter by its dialect's table of keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mapconv.adapter import Adapter, LoraSettings, Module, TensorRef
from mapconv.checkpoint.headers import TensorFile
from mapconv.checkpoint.reader import TensorReader
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.base import Found
from mapconv.formats.image.keys import KeyParts, KeyTable
from mapconv.formats.image.updates import additions_of, finite, module_of, update_of
from mapconv.formats.lomap import EPS, scalars_of
from mapconv.spelling import AuthorsScalars
from mapconv.untrusted.schema import shown
from mapconv.wording import counted

#: At most this many keys are named in a sentence.
_NAMED = 3
#: The scaling of a module by its key's prefix and name, for a dialect that has it elsewhere than beside the factors.
Scaling = Callable[[KeyParts], float | None]
#: The floor under the norms of MAP's authors, where the header says that the module is theirs; None where it does not.
Floor = Callable[[KeyParts], float | None]
_SCALARS = {"alpha": "map_alpha", "beta": "map_beta"}


@dataclass(frozen=True)
class ImageDialect:
    """A dialect that a table of keys describes; a file is its own where one of ``signs`` (endings) occurs in it.

    ``mixes``: one file may have factors under several endings. ``alphas`` reads alphas from the header, where they are,
    and ``floors`` what it says of MAP.
    """

    name: str
    keys: KeyTable
    signs: frozenset[str]
    mixes: bool = False
    alphas: Callable[[TensorFile], Scaling] | None = None
    floors: Callable[[TensorFile], Floor] | None = None

    def recognise(self, found: Found) -> bool:
        if found.header is None:
            return False
        split = (self.keys.split(ref.name) for ref in found.header.tensors)
        return any(item is not None and item[2] in self.signs for item in split)

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        file = found.header
        assert file is not None  # it was recognised by its keys
        parts, foreign = self.keys.gather(file.tensors)
        if foreign:
            raise self._foreign(file, foreign)
        scaling = None if self.alphas is None else self.alphas(file)
        updates = [update for update in map(update_of, parts) if update is not None]
        with TensorReader() as reader:
            modules = tuple(_module(item, reader, scaling) for item in updates)
            authors = self._authors_scalars(file, list(zip(updates, modules, strict=True)), reader)
        additions = tuple(addition for item in parts for addition in additions_of(item))
        has_magnitudes = any(module.magnitude for module in modules)
        if authors and (has_magnitudes or additions):
            raise UnsupportedError(
                f"{file.path} has the scalars of MAP together with {'magnitudes' if has_magnitudes else 'biases'}, "
                "which is nothing that MAP's authors train."
            )
        method: Literal["LoRA", "DoRA", "LoMAP"] = "LoMAP" if authors else "DoRA" if has_magnitudes else "LoRA"
        return Adapter(
            path=file.path,
            method=method,
            config={},
            settings=LoraSettings.of_modules(dora=method == "DoRA"),
            modules=modules,
            whole=(),
            others={},
            base=None,
            revision=None,
            dialect=self.name,
            additions=additions,
            authors_scalars=authors,
        )

    def _authors_scalars(
        self, file: TensorFile, updates: Sequence[tuple[KeyParts, Module]], reader: TensorReader
    ) -> tuple[AuthorsScalars, ...]:
        """Those of every module where any has them, or the header says so."""
        floors: Floor = (lambda parts: None) if self.floors is None else self.floors(file)
        if not any(_SCALARS.values() & item.tensors.keys() or floors(item) is not None for item, _ in updates):
            return ()
        result = []
        for item, module in updates:
            own = {which: item.tensors[part] for which, part in _SCALARS.items() if part in item.tensors}
            floor = floors(item)
            result.append(scalars_of(module, own, EPS if floor is None else floor, reader))
        return tuple(result)

    def _foreign(self, file: TensorFile, foreign: Sequence[TensorRef]) -> AdapterError:
        named = ", ".join(ref.name for ref in foreign[:_NAMED]) + ", …" * (len(foreign) > _NAMED)
        trained = file.metadata.get("ss_network_module")
        by = f" (trained with --network_module {shown(trained)})" if trained else ""
        return UnsupportedError(
            f"{file.path} has the keys of {self.name}{by}, but {counted(len(foreign), 'tensor')} of it "
            f"{'has' if len(foreign) == 1 else 'have'} none of those: {named}."
        )


def _module(parts: KeyParts, reader: TensorReader, scaling: Scaling | None) -> Module:
    if set(parts.tensors) == {"alpha"}:
        ref = parts.tensors["alpha"]
        raise AdapterError(f"{ref.file}: {ref.name} is the alpha of a module that the file has not got.")
    alpha = _alpha(parts, reader)
    return module_of(parts, scaling(parts) if alpha is None and scaling is not None else alpha)


def _alpha(parts: KeyParts, reader: TensorReader) -> float | None:
    ref = parts.tensors.get("alpha")
    if ref is None:
        return None
    if ref.numel != 1:
        raise AdapterError(f"{ref.file}: {ref.name} is {list(ref.shape)}, expected one number.")
    return finite(float(reader.read(ref).double()), ref)
