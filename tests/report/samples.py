"""Made-up results for reports: a ledger of any length, and the records of a calibration."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

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
    config["calibration"] = {
        "mode": "distill", "steps": 200, "kl_base": 0.6171, "kl_before": 2.0e-4, "kl_after": 1.1e-4,
    }  # fmt: skip
    path.write_text(json.dumps(config))
