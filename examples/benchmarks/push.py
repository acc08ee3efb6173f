"""How long a push takes, beside a bare ``HfApi.upload_folder`` of the same folder, against a loopback Hub.

    python examples/benchmarks/push.py [--megabytes 20] [--repeats 5]

Each measurement is a fresh process that times one call, libraries loaded, into a new repository: mapconv and the bare
client take turns. The bar is that a push takes at most twice as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import mapconv

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.fake_hub import FakeHub  # noqa: E402  (the tests' server)

WIDTH, LAYERS, TARGETS = 1024, 6, ("q_proj", "v_proj")

PUSH = """
import json, sys, time
import huggingface_hub.hf_api, mapconv.commands.push, mapconv.publishing.picture
start = time.perf_counter()
result = mapconv.push(sys.argv[1], sys.argv[2], base_id="lab/base")
print(json.dumps({"seconds": time.perf_counter() - start, "commit": result.commit}))
"""
BARE = """
import json, sys, time
import huggingface_hub.hf_api
start = time.perf_counter()
api = huggingface_hub.HfApi()
api.create_repo(sys.argv[2], exist_ok=True)
result = api.upload_folder(repo_id=sys.argv[2], folder_path=sys.argv[1])
print(json.dumps({"seconds": time.perf_counter() - start, "commit": result.oid}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = make_adapter(folder, arguments.megabytes * 1e6)
        size = sum(path.stat().st_size for path in adapter.iterdir())
        print(f"{size / 1e6:.1f} MB in {len(list(adapter.iterdir()))} files, {arguments.repeats} runs of each")
        for xet in (False, True):
            with FakeHub(folder / f"server-{xet}", xet=xet) as hub:
                times = measure(hub, adapter, folder, arguments.repeats)
            push, bare = (statistics.median(times[kind]) for kind in ("push", "bare"))
            print(
                f"{'Xet' if xet else 'LFS'}: push {push:.3f} s ({spread(times['push'])}), "
                f"upload_folder {bare:.3f} s ({spread(times['bare'])}), ratio {push / bare:.2f} (bar: 2)"
            )


def measure(hub: FakeHub, adapter: Path, folder: Path, repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"push": [], "bare": []}
    for number in range(repeats):
        for kind, code in (("push", PUSH), ("bare", BARE)):
            # What was stored before is not uploaded again, so each run starts from an empty server.
            hub.store.objects.clear()
            clear(hub.store.xet_folder)
            env = hub.environment(folder / f"home-{hub.xet}-{kind}-{number}") | {"PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", code, str(adapter), f"me/{kind}-{number}"]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            answer = json.loads(done.stdout.splitlines()[-1])
            if answer["commit"] != hub.store.repos[f"me/{kind}-{number}"].branches["main"]:
                raise SystemExit(f"{kind} {number} did not arrive")
            times[kind].append(answer["seconds"])
    return times


def make_adapter(folder: Path, nbytes: float) -> Path:
    """A MAP adapter of about ``nbytes``, converted from a LoRA on a made-up base."""
    torch.manual_seed(0)
    base, lora = folder / "base", folder / "lora"
    base.mkdir()
    lora.mkdir()
    paths = [f"model.layers.{layer}.self_attn.{name}" for layer in range(LAYERS) for name in TARGETS]
    rank = max(1, round(nbytes / (len(paths) * 2 * WIDTH * 4)))
    save_file({f"{path}.weight": torch.randn(WIDTH, WIDTH).bfloat16() for path in paths}, base / "model.safetensors")
    tensors = {}
    for path in paths:
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, WIDTH)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(WIDTH, rank) / rank
    save_file(tensors, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(TARGETS)}
    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return mapconv.upgrade(lora).out


def clear(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def spread(seconds: list[float]) -> str:
    return f"{min(seconds):.3f} to {max(seconds):.3f}"


if __name__ == "__main__":
    main()
