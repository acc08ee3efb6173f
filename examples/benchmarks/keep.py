"""Merge an adapter into a quantized base and keep its storage: what of the update survives, and the KL to the source.

    python examples/benchmarks/keep.py BASE ADAPTER TRAIN.txt UNSEEN.txt --work /tmp/bench [--storage int4 …]

The source is the quantized base with the adapter unmerged; the KL is taken in float32 on text that was not seen. Each
base is made here, by rounding to nearest with the scales that fit best; in bfloat16 it is BASE itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.checkpoint.codecs import plain_view
from mapconv.checkpoint.codecs.base import EncodedTensor
from mapconv.checkpoint.codecs.encode import open_store
from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.reader import TensorReader

WEIGHTS, GROUP, PLAIN = "model.safetensors", 32, "bfloat16"
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
WAYS = [
    {"rounding": "nearest", "scales": "keep"},
    {"rounding": "nearest", "scales": "recompute"},
    {"rounding": "feedback", "scales": "keep"},
    {"rounding": "feedback", "scales": "recompute"},
]


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"format": kind}}, "ignore": ["lm_head"],
    }  # fmt: skip


#: The configuration of each storage, and the tensors of a weight (n, m) before anything is in them.
STORAGES: dict[str, Any] = {
    "block FP8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        lambda n, m, w: {
            "weight": torch.zeros(n, m, dtype=torch.float8_e4m3fn),
            "weight_scale_inv": torch.ones(-(-n // 128), -(-m // 128)),
        },
    ),
    "FP8 by rows": (
        compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False),
        lambda n, m, w: {
            "weight": torch.zeros(n, m, dtype=torch.float8_e4m3fn),
            "weight_scale": torch.ones(n, 1, dtype=torch.bfloat16),
        },
    ),
    "int8 by rows": (
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True, dynamic=False),
        lambda n, m, w: {
            "weight": torch.zeros(n, m, dtype=torch.int8),
            "weight_scale": torch.ones(n, 1, dtype=torch.bfloat16),
        },
    ),
    "int4": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=True),
        lambda n, m, w: {
            "weight_packed": torch.zeros(n, m // 8, dtype=torch.int32),
            "weight_scale": torch.ones(n, m // GROUP, dtype=torch.bfloat16),
            "weight_shape": torch.tensor([n, m]),
        },
    ),
    "NVFP4": (
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        lambda n, m, w: {
            "weight_packed": torch.zeros(n, m // 2, dtype=torch.uint8),
            "weight_scale": torch.ones(n, m // 16).to(torch.float8_e4m3fn),
            "weight_global_scale": 448 * 6 / w.abs().max()[None],
        },
    ),
    "MXFP4": (
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        lambda n, m, w: {
            "weight_packed": torch.zeros(n, m // 2, dtype=torch.uint8),
            "weight_scale": torch.full((n, m // 32), 127, dtype=torch.uint8),
        },
    ),
    "NF4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        lambda n, m, w: {
            "weight": torch.zeros(n * m // 2, 1, dtype=torch.uint8),
            "weight.absmax": torch.ones(n * m // 64),
            "weight.quant_map": torch.tensor(NF4),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(
                list(json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, m]}).encode()),
                dtype=torch.uint8,
            ),
        },
    ),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
        lambda n, m, w: {
            "qweight": torch.zeros(m // 8, n, dtype=torch.int32),
            "qzeros": torch.zeros(m // GROUP, n // 8, dtype=torch.int32),
            "scales": torch.ones(m // GROUP, n, dtype=torch.float16),
            "g_idx": torch.arange(m, dtype=torch.int32) // GROUP,
        },
    ),
    "AWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
        lambda n, m, w: {
            "qweight": torch.zeros(m, n // 8, dtype=torch.int32),
            "qzeros": torch.zeros(m // GROUP, n // 8, dtype=torch.int32),
            "scales": torch.ones(m // GROUP, n, dtype=torch.float16),
        },
    ),
}


def quantize(plain: Path, storage: str, folder: Path) -> Path:
    """The model with its linear layers in a storage."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    settings, empty = STORAGES[storage]
    values = load_file(plain / WEIGHTS)
    tensors = {name: tensor for name, tensor in values.items() if "_proj" not in name}
    for name in values.keys() - tensors.keys():
        parts = empty(*values[name].shape, values[name].float())
        tensors |= {f"{name.removesuffix('weight')}{ending}": part for ending, part in parts.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": settings}
    with TensorReader() as reader:
        view = plain_view(read_checkpoint(folder), config, settings, reader)
        for ref in view.tensors.values():
            if isinstance(ref, EncodedTensor):
                store, wanted = open_store(ref.encoding, reader), values[ref.name].float()
                store.rescale(wanted)
                for part, _, data in store.parts(store.grid.nearest(wanted, slice(None))):
                    tensors[part.name] = data.view(tensors[part.name].dtype).view(tensors[part.name].shape)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for file in plain.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rows(options: argparse.Namespace, storage: str) -> Iterator[str]:
    plain = storage == PLAIN
    base = options.base if plain else quantize(options.base, storage, options.work / storage.replace(" ", "-"))
    for number, way in enumerate(WAYS):
        if (options.ways is not None and number not in options.ways) or (plain and way["scales"] == "recompute"):
            continue
        wish: dict[str, Any] = {"rounding": way["rounding"]}
        wish |= {"dtype": PLAIN} if plain else {"quantized": "keep", "scales": way["scales"]}
        if way["rounding"] == "feedback":
            wish |= {"data": options.train, "samples": options.samples}
        started = time.perf_counter()
        merged = mapconv.merge(options.adapter, options.work / "out", base=base, force=True, **wish)
        seconds = time.perf_counter() - started
        report = mapconv.verify(merged.out, options.adapter, base=base, data=options.unseen)
        kept, scales = merged.survival, "–" if plain else way["scales"]
        yield (
            f"| {storage} | {way['rounding']} | {scales} | {report.kl:.2e} | {kept.projection:.3f} | "
            f"{kept.changed_share:.0%} | {kept.error:.2f} | {seconds:.0f} s |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "train", "unseen"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--storage", nargs="+", choices=[PLAIN, *STORAGES], default=[PLAIN, *STORAGES])
    parser.add_argument("--samples", type=int, default=32, help="sequences of 256 tokens for feedback")
    parser.add_argument("--ways", type=int, nargs="+", help="which ways, by number")
    options = parser.parse_args()
    print("| storage | rounding | scales | KL to the source | survives | changed | ε | time |")
    print("|---|---|---|---|---|---|---|---|")
    for storage in options.storage:
        for row in rows(options, storage):
            print(row, flush=True)


if __name__ == "__main__":
    main()
