"""Quantized storages, one file each; ``plain_view`` shows any of them as a checkpoint of plain weights.

=====================  ==============================================================================
bitsandbytes           nf4 and fp4, single or double quantization; int8
fp8                    float8 by blocks, or with one scale for the weight
compressed-tensors     float8 and int8 by tensor, row, group or block; int1 to int8 packed; NVFP4, MXFP4
mxfp4                  gpt-oss: experts in MXFP4, transposed
modelopt               FP8, NVFP4
fbgemm_fp8             float8 by rows
gptq                   2, 3, 4 and 8 bits, both versions, act-order
awq                    4 bits, the GEMM layout
mlx                    2 to 8 bits, MXFP4, MXFP8, NVFP4; embeddings too
gguf                   Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, MXFP4; a file instead of a folder
=====================  ==============================================================================

Another ``quant_method`` is refused by its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.awq import Awq
from mapconv.checkpoint.codecs.base import Bytes, Codec, EncodedTensor, QuantizedModel
from mapconv.checkpoint.codecs.bitsandbytes import BitsAndBytes
from mapconv.checkpoint.codecs.block_fp8 import BlockFp8
from mapconv.checkpoint.codecs.compressed_tensors import CompressedTensors
from mapconv.checkpoint.codecs.fbgemm_fp8 import FbgemmFp8
from mapconv.checkpoint.codecs.gguf import gguf_view
from mapconv.checkpoint.codecs.gptq import Gptq
from mapconv.checkpoint.codecs.mlx import Mlx
from mapconv.checkpoint.codecs.modelopt import ModelOpt
from mapconv.checkpoint.codecs.mxfp4 import Mxfp4
from mapconv.checkpoint.gguf.header import is_gguf
from mapconv.checkpoint.gguf.model import read_gguf_model
from mapconv.checkpoint.index import Checkpoint
from mapconv.errors import CheckpointError, UnsupportedError

__all__ = ["described_by", "plain_dtype", "plain_view", "storages"]

CODECS: tuple[Codec, ...] = (
    BitsAndBytes(), BlockFp8(), CompressedTensors(), Mxfp4(), ModelOpt(), FbgemmFp8(), Gptq(), Awq(), Mlx(),
)  # fmt: skip
_SIGNATURES = tuple(ending for codec in CODECS for ending in codec.signature)
#: What a server needs beside the weights: scales of inputs and of the cache. No plain model has them.
_SERVING = (
    ".input_scale", ".activation_scale", ".input_global_scale", ".input_zero_point", ".output_scale", ".q_scale",
    ".k_scale", ".v_scale",
)  # fmt: skip
#: What tensors of a plain model are stored in; a tensor of another dtype is the code of something.
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "BOOL")
_OUTPUT_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_ADVICE = "give the 16-bit or 32-bit model with --base"


def described_by(checkpoint: Checkpoint, settings: Mapping[str, Any] | None) -> list[TensorRef]:
    """The small tensors whose values ``plain_view`` reads, so that they may be fetched together."""
    codec = None if is_gguf(checkpoint.folder) else _codec(checkpoint, settings)
    return [] if codec is None else codec.describing(checkpoint.tensors)


def plain_view(
    checkpoint: Checkpoint, config: Mapping[str, Any], settings: Mapping[str, Any] | None, reader: Bytes
) -> Checkpoint:
    """The checkpoint as if it held plain weights: ``EncodedTensor``s stand for those that it stores in codes.

    A checkpoint that is not quantized is returned as it is.

    Args:
        checkpoint: the headers of the files.
        config: the model's configuration.
        settings: its quantization configuration (``quantization_settings``), None where it has none.
        reader: for the few tensors that describe others.

    Raises:
        CheckpointError: companions that are missing or do not fit, or codes that no codec knows.
        UnsupportedError: a storage, or a version of one, that mapconv does not read.
    """
    if is_gguf(checkpoint.folder):
        return _gguf_view(checkpoint, config)
    codec = _codec(checkpoint, settings)
    if codec is None:
        return checkpoint
    model = QuantizedModel(
        checkpoint.folder, checkpoint.tensors, settings or {}, config, _output_dtype(checkpoint, config, codec), reader
    )
    encoded = {weight.stored[0].name: weight for weight in codec.weights(model)}
    _refuse_leftovers(checkpoint, codec, model, encoded)
    dropped = model.taken | {name for name in checkpoint.tensors if name.endswith(_SERVING)}
    names: set[str] = set()

    def shown(refs: tuple[TensorRef, ...]) -> Iterator[TensorRef]:
        for ref in refs:
            new = encoded.get(ref.name, ref)
            if ref.name in dropped and ref.name not in encoded:
                continue
            if new.name in names:
                raise CheckpointError(f"{checkpoint.folder}: the weight {new.name} is stored twice.")
            names.add(new.name)
            yield new

    files = tuple(replace(file, tensors=tuple(shown(file.tensors))) for file in checkpoint.files)
    tensors = {ref.name: ref for file in files for ref in file.tensors}
    return replace(checkpoint, files=files, tensors=tensors, stored_files=checkpoint.files)


def _gguf_view(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    model = read_gguf_model(checkpoint.folder, None if checkpoint.source is None else checkpoint.source.require)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    return gguf_view(checkpoint, model, _OUTPUT_DTYPES.get(config.get("dtype", ""), "BF16"), heads)


def storages(checkpoint: Checkpoint) -> Counter[str]:
    """How many weights of a plain view are stored in codes, by the storage's name."""
    return Counter(ref.encoding.label for ref in checkpoint.tensors.values() if isinstance(ref, EncodedTensor))


def plain_dtype(checkpoint: Checkpoint) -> str:
    """What most weights of a plain view are written as, in a configuration's words; ``auto`` where all are plain."""
    sizes: Counter[str] = Counter()
    for ref in checkpoint.tensors.values():
        if isinstance(ref, EncodedTensor):
            sizes[ref.dtype] += ref.numel
    names = {stored: name for name, stored in _OUTPUT_DTYPES.items()}
    return names[sizes.most_common(1)[0][0]] if sizes else "auto"


def _codec(checkpoint: Checkpoint, settings: Mapping[str, Any] | None) -> Codec | None:
    """The codec that the configuration names; without one, that of tensors which nothing else can be."""
    method = None if settings is None else settings.get("quant_method")
    if method is None:
        signed = [name for name in checkpoint.tensors if name.endswith(_SIGNATURES)]
        return next((codec for codec in CODECS if any(name.endswith(codec.signature) for name in signed)), None)
    for codec in CODECS:
        if method in codec.methods:
            return codec
    raise UnsupportedError(
        f"{checkpoint.folder} is quantized ({method}), a format that mapconv cannot read: {_ADVICE}."
    )


def _refuse_leftovers(
    checkpoint: Checkpoint, codec: Codec, model: QuantizedModel, encoded: Mapping[str, EncodedTensor]
) -> None:
    """Codes without scales, scales without codes, and a configuration that says what no tensor bears out."""
    method = codec.methods[0]
    for name, ref in checkpoint.tensors.items():
        if name in model.taken or name.endswith(_SERVING):
            continue
        if ref.dtype not in _PLAIN_DTYPES:
            raise CheckpointError(
                f"{ref.file}: {name} has dtype {ref.dtype}, but not what makes it a weight quantized by {method}: "
                f"download the model again, or {_ADVICE}."
            )
        if name.endswith(codec.companions):
            raise CheckpointError(f"{ref.file}: {name} belongs to no weight quantized by {method}: download it again.")
    if not encoded:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json says that the model is quantized ({method}), but none of its tensors is: "
            f"remove quantization_config if the weights are plain, or {_ADVICE}."
        )


def _output_dtype(checkpoint: Checkpoint, config: Mapping[str, Any], codec: Codec) -> str:
    """What the plain weights are written as: the configuration's dtype, else that of most plain tensors."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in _OUTPUT_DTYPES:
                return _OUTPUT_DTYPES[part[key]]
    sizes = Counter()
    for name, ref in checkpoint.tensors.items():
        if ref.dtype in ("F16", "BF16") and not name.endswith(codec.companions):
            sizes[ref.dtype] += ref.nbytes
    return max(sizes, key=sizes.__getitem__, default="BF16")
