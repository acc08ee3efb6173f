"""AWQ in its GEMM layout: 4-bit codes packed along the outputs in an order of its own, inputs in rows.

``w[out, in] = (code − zero) · scale``, no one added; nibble i of a word, the lowest first, is output
``8·word + (0, 2, 4, 6, 1, 3, 5, 7)[i]``, for codes and zero points alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.arithmetic import expand_nibbles, nibble_table, read_floats, scale_, shift_
from mapconv.checkpoint.codecs.base import Bytes, EncodedTensor, QuantizedModel, fault
from mapconv.errors import UnsupportedError

_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
#: The nibble that holds each output.
_NIBBLE_OF = _ORDER.argsort()
_NIBBLES = nibble_table(torch.arange(16.0), low_first=True)


@dataclass(frozen=True)
class AwqGemm:
    """One weight (height, width), with ``group`` inputs to a scale."""

    codes: TensorRef
    zero: TensorRef
    scale: TensorRef
    height: int
    width: int
    group: int
    label: str = "AWQ int4"

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return self.codes, self.zero, self.scale

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(self._outputs(reader.kept(self.codes, "codes", lambda: self._words(reader, self.codes)), start, stop))
        zeros = self._outputs(reader.kept(self.codes, "zeros", lambda: self._words(reader, self.zero)), start, stop)
        shift_(out, -zeros, self.group)
        scales = reader.kept(self.codes, "scales", lambda: self._scales(reader))[start:stop]
        scale_(out, scales, self.group, self.scale)

    def _words(self, reader: Bytes, ref: TensorRef) -> torch.Tensor:
        """(height / 8, columns, 4) bytes: the words of eight outputs side by side."""
        words = reader.read_bytes(ref, 0, ref.nbytes).view(torch.int32).view(ref.shape)
        return words.T.contiguous().view(torch.uint8).view(words.shape[1], words.shape[0], 4)

    def _outputs(self, words: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Codes of outputs ``start`` to ``stop``, (rows, columns) float32."""
        first, last = start // 8, -(-stop // 8)
        values = torch.empty(last - first, words.shape[1], 8)
        expand_nibbles(words[first:last].reshape(-1), _NIBBLES, values.view(-1))
        values = values.permute(0, 2, 1)[:, _NIBBLE_OF].flatten(0, 1)
        return values[start - 8 * first : stop - 8 * first]

    def _scales(self, reader: Bytes) -> torch.Tensor:
        return read_floats(reader, self.scale, 0, self.scale.numel).view(self.scale.shape).T.contiguous()


class Awq:
    """Recognises each module by ``qweight``."""

    methods = ("awq",)
    signature = ()
    companions = (".qweight", ".qzeros", ".scales")

    def describing(self, tensors: Mapping[str, TensorRef]) -> list[TensorRef]:
        return []

    def weights(self, model: QuantizedModel) -> Iterator[EncodedTensor]:
        version, bits = str(model.settings.get("version") or "gemm").lower(), model.settings.get("bits", 4)
        if version != "gemm" or bits != 4:
            raise UnsupportedError(
                f"{model.folder} is quantized (awq, version {version}, {bits} bits), a form that mapconv does not "
                "read: give the 16-bit or 32-bit model with --base."
            )
        for path, codes in model.ending(".qweight"):
            scale, zero = model.take(f"{path}.scales", owner=codes), model.take(f"{path}.qzeros", owner=codes)
            if codes.dtype != "I32" or len(codes.shape) != 2:
                raise fault(codes, f"is {codes.dtype} {list(codes.shape)}, expected I32 [inputs, outputs / 8]")
            width, height = codes.shape[0], 8 * codes.shape[1]
            groups = scale.shape[0] if len(scale.shape) == 2 else 0
            if scale.shape != (groups, height) or not groups or scale.dtype not in ("F32", "F16", "BF16"):
                raise fault(scale, f"is {scale.dtype} {list(scale.shape)}, expected groups of {height} floats")
            if zero.shape != (groups, codes.shape[1]) or zero.dtype != "I32":
                raise fault(zero, f"is {zero.dtype} {list(zero.shape)}, expected I32 {[groups, codes.shape[1]]}")
            group = model.settings.get("group_size")
            group = group if type(group) is int and group > 0 else -(-width // groups)
            if -(-width // group) != groups:
                raise fault(scale, f"is {list(scale.shape)}, expected {-(-width // group)} groups of {group} inputs")
            yield model.encoded(f"{path}.weight", (height, width), AwqGemm(codes, zero, scale, height, width, group))
