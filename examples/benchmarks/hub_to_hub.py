"""A merge from Hub to Hub: disk, memory, and time beside downloading, merging and uploading one after the other; kills.

    python examples/benchmarks/hub_to_hub.py /tmp/bench [--runs 3] [--kills 30] [--seed 0] [--dora]
        [--layers 16] [--vocabulary 128256] [--shard-megabytes 700]

A loopback Hub (that of the tests, with its large files on the disk below the folder) has a model of Llama-3.2-1B's
shape, of which the last three options say how much. The peer is one process that calls ``snapshot_download``,
``mapconv.merge`` and ``mapconv.push``; ours and the peer's take turns. Then runs are killed at random moments, three of
one merge in turn, and the next one finishes it: the commit must have the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import mmap
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import llama_shape
from llama_shape import write_adapter, write_model
from measure import ROOT, Run, median, run

sys.path.insert(0, ROOT)
from tests.disk import peak_of
from tests.fake_hub import FakeHub  # (the tests' server)

BASE, TO = "lab/base", "me/merged"
KILLS_PER_ROUND = 3
PEER = """
import sys
from huggingface_hub import snapshot_download
import mapconv
adapter, out = sys.argv[1:]
snapshot_download("lab/base")
mapconv.merge(adapter, out, base="lab/base")
mapconv.push(out, "me/merged")
"""
START_UP = "import huggingface_hub.hf_api, mapconv.commands.merge"


class OnDisk(dict):
    """Large files by their hashes, in a folder rather than in memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        folder.mkdir()

    def __setitem__(self, sha256: str, content: bytes) -> None:
        path = self._folder / sha256
        path.write_bytes(content)
        super().__setitem__(sha256, mapped(path))

    def forget(self, kept: set[str]) -> None:
        for sha256 in self.keys() - kept:
            (self._folder / sha256).unlink(missing_ok=True)
            del self[sha256]


def mapped(path: Path) -> memoryview:
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=llama_shape.VOCAB)
    parser.add_argument("--shard-megabytes", type=int, default=llama_shape.SHARD_BYTES // 10**6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dora", action="store_true")
    options = parser.parse_args()
    llama_shape.VOCAB, llama_shape.SHARD_BYTES = options.vocabulary, options.shard_megabytes * 10**6
    base = options.folder / f"base-{options.layers}-{options.vocabulary}-{options.shard_megabytes}"
    write_model(base, options.layers)
    method = "dora" if options.dora else "lora"
    adapter = options.folder / f"{method}-{options.layers}"
    write_adapter(adapter, base, use_dora=options.dora, layers=options.layers)
    server = options.folder / "server"
    shutil.rmtree(server, ignore_errors=True)
    server.mkdir()
    with FakeHub(server) as hub:
        bench = Bench(hub, base, adapter, options.folder)
        bench.compare(options.runs)
        if options.kills:
            bench.kill(options.kills, random.Random(options.seed))


class Bench:
    def __init__(self, hub: FakeHub, base: Path, adapter: Path, folder: Path) -> None:
        self.hub, self.adapter, self.folder = hub, adapter, folder
        self.objects = hub.store.objects = OnDisk(folder / "server" / "objects")
        repo = hub.repo(BASE)
        weights = sorted(base.glob("*.safetensors"))
        hub.store.add_files(repo, {path.name: path.read_bytes() for path in sorted(base.glob("*.json"))})
        for path in weights:  # one after the other: a model may be larger than the memory
            hub.store.add_files(repo, {path.name: path.read_bytes()})
        self.kept, self.expected = set(self.objects), {}
        self.sizes = [path.stat().st_size for path in weights]
        self.work, self.home = folder / "work", folder / "home"
        words = ["merge", adapter, "--base", BASE, "--push-to", TO, "--work-dir", self.work, "-q"]
        self.command = [sys.executable, "-m", "mapconv", *map(str, words)]

    def compare(self, runs: int) -> None:
        ours: list[Run] = []
        theirs: list[Run] = []
        disks: list[int] = []
        for _ in range(runs):
            self._forget()
            with peak_of(self.work, every=0.02) as peak:
                ours.append(run(*self.command, environment=self._environment()))
            disks.append(peak[0])
            self._check()
            self._forget()
            out = self.folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            theirs.append(run(sys.executable, "-c", PEER, self.adapter, out, environment=self._environment()))
            shutil.rmtree(out)
            self._check()
        print(
            f"{sum(self.sizes) / 1e6:,.0f} MB in {len(self.sizes)} files, the largest {max(self.sizes) / 1e6:,.0f} MB"
        )
        print(f"peak disk    {max(disks) / 1e6:8,.0f} MB, {max(disks) / max(self.sizes):.2f} of the largest (bar: 2)")
        print(f"peak memory  {max(one.megabytes for one in ours):8,.0f} MB (bar: 500)")
        own, peer = median(ours), median(theirs)
        ratio = own.seconds / peer.seconds
        print(f"time         {own.seconds:8.1f} s, peer {peer.seconds:.1f} s, ratio {ratio:.2f} (bar: 1.3)")
        print(f"processor    {own.cpu:8.1f} s, peer {peer.cpu:.1f} s, ratio {own.cpu / peer.cpu:.2f}")
        self.start_up = run(sys.executable, "-c", START_UP).seconds
        self.seconds = own.seconds

    def kill(self, kills: int, moments: random.Random) -> None:
        fell: Counter[str] = Counter()
        while fell.total() < kills:
            self._forget()
            for _ in range(KILLS_PER_ROUND):
                process = subprocess.Popen(self.command, env=self._environment(), stdout=subprocess.DEVNULL)
                moment = self.start_up + moments.random() * (self.seconds - self.start_up)
                try:
                    status = process.wait(moment)
                except subprocess.TimeoutExpired:
                    process.kill()
                    status = process.wait()
                if status == 0:
                    break  # it had come to its end
                if status != -9:
                    sys.exit(f"a run that went on after a kill failed with {status}")
                fell[self._progress()] += 1
            run(*self.command, environment=self._environment())
            self._check()
        places = ", ".join(f"{count} with {place}" for place, count in sorted(fell.items()))
        print(f"{fell.total()} kills ({places}): each was gone on after to the same commit")

    def _progress(self) -> str:
        uploads = sum(sha256 not in self.kept for sha256 in self.objects)
        return f"{uploads} of {len(self.sizes)} files sent"

    def _check(self) -> None:
        """Hold the published files to those of the first run: their hashes, which the storage has checked."""
        files = {name: blob.oid for name, blob in self.hub.files(TO).items()}
        if "map_merge.json" not in files:
            sys.exit("nothing was published")
        self.expected = self.expected or files
        if files != self.expected:
            different = sorted(name for name in files | self.expected if files.get(name) != self.expected.get(name))
            sys.exit(f"other bytes than before in {', '.join(different)}")

    def _forget(self) -> None:
        """No merged model on the Hub, and no cache of it here."""
        self.hub.store.repos.pop(TO, None)
        self.objects.forget(self.kept)
        self.hub.requests.clear()
        for folder in (self.work, self.home):
            shutil.rmtree(folder, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        return self.hub.environment(self.home) | {"PYTHONPATH": ROOT, "HF_HUB_OFFLINE": "0"}


if __name__ == "__main__":
    main()
