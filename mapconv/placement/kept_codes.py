"""A quantized base that a merge leaves as it is but for plain tensors, where the adapters change no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs import storages
from mapconv.checkpoint.codecs.base import EncodedTensor
from mapconv.checkpoint.codecs.encode import is_writable
from mapconv.checkpoint.gguf.header import is_gguf
from mapconv.checkpoint.headers import TensorFile
from mapconv.checkpoint.model_config import read_model_config
from mapconv.checkpoint.quantization import can_leave_out, quantization_settings
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.target_model import TargetModel, files_with


def keep_codes(
    placed: Sequence[PlacedAdapter], *, rewrite: bool = False, lift: Callable[[str], bool] | None = None
) -> tuple[PlacedAdapter, ...]:
    """The adapters on a target model whose untouched weights stay in their codes, byte for byte.

    With ``rewrite``, weights that the adapters change go back into codes of the same storage, but for those whose
    module's path is one to ``lift``: these become plain.

    Raises:
        UnsupportedError: an adapter changes a weight that is stored in codes, and these cannot be written; or with
            ``rewrite`` a base without any.
        PlacementError: ``lift`` fits no changed weight.
    """
    target = placed[0].target
    if is_gguf(target.folder):
        raise UnsupportedError(
            f"{target.folder} is a GGUF file, whose blocks no other kind of file can hold: leave out --quantized, "
            "and the merged model has plain weights."
        )
    if rewrite and not storages(target.checkpoint):
        raise UnsupportedError(
            f"{target.folder} is not quantized, so there are no codes to keep: leave out --quantized keep."
        )
    pieces = {piece.tensor.name for adapter in placed for item in adapter.modules for piece in item.weight.pieces}
    changed = [*sorted(pieces), *target.rows, *target.biases]
    whole = [name for name, ref in target.checkpoint.tensors.items() if target.tensors.get(name) is not ref]
    encoded: dict[str, EncodedTensor] = {}
    lifted: dict[str, EncodedTensor] = {}
    for name in (*changed, *whole):
        ref = target.checkpoint.tensors.get(name)
        if not isinstance(ref, EncodedTensor):
            continue
        if lift is not None and name not in whole and lift(name.removesuffix(".weight")):
            lifted[name] = ref
        elif rewrite and is_writable(ref.encoding) and name not in whole and name not in target.biases:
            encoded[name] = ref
        elif rewrite:
            why = "replaces it as a whole" if name in whole else "changes it"
            raise UnsupportedError(
                f"{ref.file}: {name} is stored as {ref.encoding.label}, and the adapter {why}, which cannot be written "
                "in these codes: leave out --quantized keep, and the merged model has plain weights."
            )
        else:
            raise UnsupportedError(
                f"{ref.file}: {name} is stored as {ref.encoding.label}, and the adapter changes it: leave out "
                "--quantized copy, and the merged model has plain weights."
            )
    files = target.checkpoint.stored_files or target.checkpoint.files
    if lift is not None:
        _check_lift(target, lifted)
    tensors = dict(_stored(target, files, lifted))
    written = files_with(replace(target.checkpoint, files=files), tensors)
    kept = replace(target, files=written, tensors=tensors, encoded=encoded)
    kept = replace(kept, lifted=tuple(name.removesuffix(".weight") for name in lifted))
    return tuple(replace(adapter, target=kept) for adapter in placed)


def _check_lift(target: TargetModel, lifted: Mapping[str, EncodedTensor]) -> None:
    if not lifted:
        raise PlacementError("--lift names no weight in codes that the adapter changes.")
    if not can_leave_out(quantization_settings(target.folder, read_model_config(target.folder))):
        raise UnsupportedError(
            f"{target.folder}: its quantization configuration has no place for modules that are not quantized, so "
            f"{next(iter(lifted))} cannot leave the codes: leave out --quantized keep."
        )


def _stored(
    target: TargetModel, files: Sequence[TensorFile], lifted: Mapping[str, EncodedTensor]
) -> Iterator[tuple[str, TensorRef]]:
    """The tensors of the files as they are, with those that the adapters bring or leave out."""
    plain = target.checkpoint.tensors
    codes = {weight.stored[0].name: weight for weight in lifted.values()}
    companions = {ref.name for weight in lifted.values() for ref in weight.stored[1:]}
    for ref in (ref for file in files for ref in file.tensors):
        if ref.name in companions:
            continue
        if ref.name in codes:
            yield codes[ref.name].name, codes[ref.name]
            continue
        if ref.name not in plain or isinstance(plain[ref.name], EncodedTensor):
            yield ref.name, ref
        elif ref.name in target.tensors:
            yield ref.name, target.tensors[ref.name]
    for name, ref in target.tensors.items():
        if name not in plain and name not in lifted:
            yield name, ref
