"""FBGEMM's FP8: a scale for each output; experts of Llama 4 are stacked as (experts, in, out)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.base import EncodedTensor, QuantizedModel, fault
from mapconv.checkpoint.codecs.scaled import ScaledBytes, scaled_bytes

_LABEL = "fbgemm FP8"
_STACKS = ("gate_up_proj", "down_proj")


class FbgemmFp8:
    """Recognises it by the scales."""

    methods = ("fbgemm_fp8",)
    signature = ()
    companions = (".weight_scale", *(f".{stack}_scale" for stack in _STACKS))

    def describing(self, tensors: Mapping[str, TensorRef]) -> list[TensorRef]:
        return []

    def weights(self, model: QuantizedModel) -> Iterator[EncodedTensor]:
        for path, scale in model.ending(".weight_scale"):
            codes = model.take(f"{path}.weight", owner=scale)
            yield model.encoded(codes.name, codes.shape, scaled_bytes(_LABEL, codes, scale))
        for stack in _STACKS:
            for path, scale in model.ending(f".{stack}_scale"):
                yield self._stack(model, model.take(f"{path}.{stack}", owner=scale), scale)

    def _stack(self, model: QuantizedModel, codes: TensorRef, scale: TensorRef) -> EncodedTensor:
        if codes.dtype != "F8_E4M3" or len(codes.shape) != 3:
            raise fault(codes, f"is {codes.dtype} {list(codes.shape)}, expected F8_E4M3 [experts, in, out]")
        experts, height, width = codes.shape
        # The scales of down_proj are written as a column, but count the outputs as well.
        if scale.shape not in ((experts, 1, width), (experts, width, 1)) or scale.dtype not in ("F32", "F16", "BF16"):
            raise fault(scale, f"is {scale.dtype} {list(scale.shape)}, expected a float for each of {width} outputs")
        return model.encoded(codes.name, codes.shape, ScaledBytes(_LABEL, codes, scale, height, width, (height, 1)))
