"""Made-up results for reports: a ledger of any length, and the records of a calibration."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mapconv.adapter import MapModule

BASES = ("HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-7B", "mistralai/Mistral-7B-v0.3")
FAULTS = {
    "AdapterError": "adapters/{name}/adapter_model.safetensors is 1,024 bytes long, its header says 20,971,520: "
    "download it again.",
    "PlacementError": "2 of 224 adapter tensors of {name} fit no tensor of the base: lm_head is (32000, 4096), "
    "expected (32064, 4096).",
    "UnsupportedError": "{name} uses LoftQ, whose quantised base mapconv does not have: merge it with PEFT.",
}


def save_ledger(folder: Path, lines: list[Any], *, torn: str = "") -> Path:
    """A catalog's output folder with these lines, and a folder for each output that they name."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {"ledger": 1, "mapconv_version": "0.1.0"}
    text = "".join(json.dumps(line) + "\n" for line in (head, *lines))
    (folder / "ledger.jsonl").write_text(text + torn, encoding="utf-8")
    return folder


def entries(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Lines of a run as they would be: LoRAs exact to rounding, DoRAs not, one in 25 failed, half without a KL."""
    chance = random.Random(seed)
    return [_entry(index, chance) for index in range(number)]


def _entry(index: int, chance: random.Random) -> dict[str, Any]:
    name = f"team-{index % 37:02d}/task-{index:04d}"
    base = chance.choices(BASES, (8, 5, 3, 1))[0]
    method, rank = chance.choices(("LoRA", "DoRA"), (7, 3))[0], chance.choice((4, 8, 16, 16, 32, 64))
    line = {
        "entry": name, "fingerprint": f"sha256:{chance.getrandbits(256):064x}", "source": f"adapters/{name}",
        "base": base, "method": method, "rank": rank, "attempts": 1,
        "seconds": math.exp(chance.gauss(1.2 if method == "DoRA" else -0.7, 0.6)) * (1 + BASES.index(base)),
        "finished": f"2026-11-24T{index % 24:02d}:{index % 60:02d}:00Z",
    }  # fmt: skip
    if chance.random() < 0.04:
        kind = chance.choices(list(FAULTS), (5, 3, 1))[0]
        return line | {"status": "failed", "kind": kind, "error": FAULTS[kind].format(name=name), "attempts": 3}
    worst = math.exp(chance.gauss(math.log(0.15), 0.35)) if method == "DoRA" else 10 ** chance.gauss(-7.6, 0.25)
    if method == "LoRA" and chance.random() < 0.2:
        worst = 0.0
    modules, parameters = 32 * 7, int(rank * 4e5 * (1 + BASES.index(base)))
    return line | {
        "status": "done", "kind": None, "error": None, "output": f"out/{name}", "modules": modules,
        "worst_error": worst, "median_error": worst * 0.8, "parameters": parameters, "nbytes": 4 * parameters,
        "kl": worst**2 * chance.uniform(0.002, 0.02) if chance.random() < 0.5 else None,
    }  # fmt: skip


def calibrate_records(folder: Path, seed: int = 0) -> None:
    """Write into a MAP directory's ``map_config.json`` what a calibration would have left there."""
    chance = random.Random(seed)
    path = folder / "map_config.json"
    config = json.loads(path.read_text())
    for module in config["modules"]:
        module["error_before"] = module["error"]
        module["error"] *= chance.uniform(0.75, 1.02)
        module["output_error"] = module["error"] * chance.uniform(0.3, 0.7)
    kl = {"base": 0.6171, "source": 0.0, "closed form": 2.0e-4, "calibrated": 1.1e-4}
    config["calibration"] = {
        "objective": "distill", "train": "scalars", "steps": 200, "best_step": 160,
        "held_out_positions": 4096, "trained_parameters": 28,
        "history": [[0, 2.0e-4], [40, 1.5e-4], [160, 1.1e-4], [200, 1.2e-4]],
        "models": {name: {"kl": value, "loss": 3.5, "perplexity": 33.1} for name, value in kl.items()},
    }  # fmt: skip
    path.write_text(json.dumps(config))


def save_adapter(folder: Path, paths: Sequence[str] | None = None, *, calibrated: bool = True) -> Path:
    """A MAP directory of modules with 3 inputs and 5 outputs, whose scalars are all different."""
    chance = random.Random(1)
    if paths is None:
        paths = [f"model.layers.{n}.self_attn.{name}" for n in (0, 1, 2, 4, 5) for name in ("q_proj", "v_proj")]
        paths += ["model.layers.0.mlp.up_proj", "lm_head"]
    folder.mkdir(parents=True, exist_ok=True)
    tensors, modules = {}, []
    for number, path in enumerate(paths):
        rank = 2 + number % 2
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.ones(rank, 3)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.ones(5, rank)
        scalars = MapModule(
            path, "low-rank", rank, alpha=chance.uniform(1.8, 2.2), beta=chance.uniform(0, 0.4), base_norm=2.0,
            direction_norm=chance.uniform(0.5, 1), error=chance.uniform(0.05, 0.3),
        )  # fmt: skip
        base = {"base_tensor": f"{path}.weight", "base_dtype": "BF16", "base_shape": [5, 3]}
        modules.append(scalars.to_dict() | base)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ".*", "use_dora": False}
    config["rank_pattern"] = {re.escape(path): 2 + number % 2 for number, path in enumerate(paths)}
    config["alpha_pattern"] = dict(config["rank_pattern"])
    (folder / "adapter_config.json").write_text(json.dumps(config))
    record = {
        "format_version": 1, "mapconv_version": "0.1.0", "options": {"rank": None, "dtype": "float32"},
        "base": {"name": "owner/base", "revision": "c0ffee", "card": {}, "fingerprint": "sha256:ba5e"},
        "source": {"name": "owner/dora", "revision": None, "method": "DoRA", "fingerprint": "sha256:50c3", "card": {}},
        "modules": modules,
    }  # fmt: skip
    (folder / "map_config.json").write_text(json.dumps(record))
    if calibrated:
        calibrate_records(folder)
    return folder


def data_of(page: str) -> Any:
    """The tables that a page carries as data."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
