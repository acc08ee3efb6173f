"""A quantized base that a merge leaves as it is but for plain tensors, where the adapters change no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.base import EncodedTensor
from mapconv.checkpoint.gguf.header import is_gguf
from mapconv.checkpoint.headers import TensorFile
from mapconv.errors import UnsupportedError
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.target_model import TargetModel, files_with


def keep_codes(placed: Sequence[PlacedAdapter]) -> tuple[PlacedAdapter, ...]:
    """The adapters on a target model whose untouched weights stay in their codes, byte for byte.

    Raises:
        UnsupportedError: an adapter changes a weight that is stored in codes.
    """
    target = placed[0].target
    if is_gguf(target.folder):
        raise UnsupportedError(
            f"{target.folder} is a GGUF file, whose blocks no other kind of file can hold: leave out --quantized copy, "
            "and the merged model has plain weights."
        )
    pieces = {piece.tensor.name for adapter in placed for item in adapter.modules for piece in item.weight.pieces}
    changed = [*sorted(pieces), *target.rows, *target.biases]
    whole = [name for name, ref in target.checkpoint.tensors.items() if target.tensors.get(name) is not ref]
    for name in (*changed, *whole):
        ref = target.checkpoint.tensors.get(name)
        if isinstance(ref, EncodedTensor):
            raise UnsupportedError(
                f"{ref.file}: {name} is stored as {ref.encoding.label}, and the adapter changes it: leave out "
                "--quantized copy, and the merged model has plain weights."
            )
    files = target.checkpoint.stored_files or target.checkpoint.files
    tensors = dict(_stored(target, files))
    kept = replace(target, files=files_with(replace(target.checkpoint, files=files), tensors), tensors=tensors)
    return tuple(replace(adapter, target=kept) for adapter in placed)


def _stored(target: TargetModel, files: Sequence[TensorFile]) -> Iterator[tuple[str, TensorRef]]:
    """The tensors of the files as they are, with those that the adapters bring or leave out."""
    plain = target.checkpoint.tensors
    for ref in (ref for file in files for ref in file.tensors):
        if ref.name not in plain or isinstance(plain[ref.name], EncodedTensor):
            yield ref.name, ref
        elif ref.name in target.tensors:
            yield ref.name, target.tensors[ref.name]
    for name, ref in target.tensors.items():
        if name not in plain:
            yield name, ref
