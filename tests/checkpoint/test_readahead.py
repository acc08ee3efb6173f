"""What is read ahead while torch is imported: no more than the command needs, and never a reason to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mapconv.checkpoint import readahead
from mapconv.checkpoint.readahead import read_ahead, reading_ahead
from tests.files import read_header

WIDE = (600, 600)  # 1.4 MB: more than the gap over which two ranges are joined


@pytest.fixture
def asked(monkeypatch):
    """(file, start, count) of every hint."""
    hints = []

    def note(descriptor: int, start: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        # Linux drops what goes beyond its window, without a word.
        assert count <= 128 << 10
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if hints and hints[-1][0] == name and sum(hints[-1][1:]) == start:
            _, start, before = hints.pop()
            count += before
        hints.append((name, start, count))

    monkeypatch.setattr(os, "posix_fadvise", note)
    return hints


@pytest.fixture
def folders(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    names = ("layers.0.k.weight", "layers.0.q.weight", "layers.1.k.weight", "layers.1.q.weight")
    save_file({f"model.{name}": torch.zeros(WIDE) for name in names}, base / "model.safetensors")
    return base, adapter


def write_adapter(adapter: Path, base: Path | None, *, dora: bool) -> None:
    key = "base_model.model.model.layers.1.q"
    tensors = {f"{key}.lora_A.weight": torch.zeros(2, 600), f"{key}.lora_B.weight": torch.zeros(600, 2)}
    if dora:
        tensors[f"{key}.lora_magnitude_vector"] = torch.zeros(600)
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"base_model_name_or_path": None if base is None else str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def whole(file: Path) -> tuple[str, int, int]:
    return file.name, 0, file.stat().st_size


def span(file: Path, name: str) -> tuple[str, int, int]:
    header, data = read_header(file)
    start, stop = header[name]["data_offsets"]
    return file.name, file.stat().st_size - len(data) + start, stop - start


def test_a_lora_needs_its_own_file_alone(folders, asked):
    base, adapter = folders
    write_adapter(adapter, base, dora=False)
    read_ahead([adapter], None, whole_base=False).join()
    assert asked == [whole(adapter / "adapter_model.safetensors")]


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_dora_needs_the_weights_that_it_adapts(prefix, folders, asked):
    base, adapter = folders
    names = ("layers.0.k.weight", "layers.0.q.weight", "layers.1.k.weight", "layers.1.q.weight")
    save_file({prefix + name: torch.zeros(WIDE) for name in names}, base / "model.safetensors")
    write_adapter(adapter, None, dora=True)
    read_ahead([adapter], base, whole_base=False).join()
    needed = span(base / "model.safetensors", f"{prefix}layers.1.q.weight")
    assert asked == [whole(adapter / "adapter_model.safetensors"), needed]


def test_a_merge_needs_all_up_to_the_budget(folders, asked, monkeypatch):
    base, adapter = folders
    write_adapter(adapter, base, dora=False)
    read_ahead([adapter], None, whole_base=True).join()
    assert asked == [whole(adapter / "adapter_model.safetensors"), whole(base / "model.safetensors")]
    asked.clear()
    monkeypatch.setattr(readahead, "BUDGET", 1 << 20)
    read_ahead([adapter], None, whole_base=True).join()
    assert sum(count for _, _, count in asked) == 1 << 20


def test_files_of_image_models_and_adapters_are_read_too(tmp_path, asked):
    unet, encoder, adapter = tmp_path / "pipe" / "unet", tmp_path / "pipe" / "text_encoder", tmp_path / "a.safetensors"
    for folder in (unet, encoder):
        folder.mkdir(parents=True)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    weights = [encoder / "model.fp16.safetensors", unet / "diffusion_pytorch_model.safetensors", adapter]
    for size, file in enumerate(weights, 300_000):
        file.write_bytes(bytes(size))
    read_ahead([adapter], tmp_path / "pipe", whole_base=True).join()
    assert asked == [whole(adapter), whole(weights[0]), whole(weights[1])]
    asked.clear()
    read_ahead([adapter], weights[1], whole_base=True).join()
    assert asked == [whole(adapter), whole(weights[1])]


def test_what_jobs_read_is_asked_for_some_way_ahead(folders, asked, monkeypatch):
    base, _ = folders
    file, missing = base / "model.safetensors", base / "nothing"
    monkeypatch.setattr(readahead, "AHEAD", 250)
    jobs = [(file, 200 * number, 200 * number + 100) for number in range(6)] + [(missing, 0, 100)]
    seen = []
    for number, job in enumerate(reading_ahead(jobs, lambda job: [job])):
        seen.append(job)
        # 250 bytes from this one on are all of the next two and the start of a third.
        wanted = min(number + 3, 6)
        for _ in range(1000):
            if len(asked) == wanted:
                break
            time.sleep(0.001)
        assert [start for _, start, _ in asked] == [200 * part for part in range(wanted)]
    assert seen == jobs


def test_jobs_that_were_begun_are_not_asked_for(folders, asked):
    base, _ = folders
    file = base / "model.safetensors"
    ahead = readahead._Ahead([[(file, 200 * number, 200 * number + 100)] for number in range(4)])
    ahead.begin(2)
    ahead.run()
    assert [start for _, start, _ in asked] == [400, 600]


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"version https://git-lfs"])
def test_broken_files_are_left_to_the_command(content, folders, asked, capsys):
    base, adapter = folders
    write_adapter(adapter, base, dora=False)
    (base / "model.safetensors").write_bytes(content)
    read_ahead([adapter, "owner/name", adapter / "nothing"], None, whole_base=False).join()
    os.mkfifo(adapter.parent / "adapter_model.safetensors")
    read_ahead([adapter.parent], None, whole_base=True).join(5)
    assert capsys.readouterr() == ("", "")
    assert len(asked) == 1


def test_it_brings_no_torch_and_shows_a_line_on_a_terminal():
    code = (
        "import io, sys\n"
        "from mapconv.cli.startup import starting\n"
        "class Terminal(io.StringIO):\n"
        "    def isatty(self): return True\n"
        "for stream, quiet in ((Terminal(), False), (Terminal(), True), (io.StringIO(), False)):\n"
        "    sys.stderr = stream\n"
        "    with starting([], None, quiet=quiet): pass\n"
        "    print(repr(stream.getvalue()))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("'loading ")
    assert lines[0].endswith("\\r\\x1b[K'")
    assert lines[1:] == ["''", "''"]
