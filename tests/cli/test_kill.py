"""SIGKILL at many moments of a merge and of an upgrade: OUT is absent or complete, and the next run puts all right.

Most victims are forks that have torch in memory already, so that the moments fall into the work; one is the command
as a user starts it.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.checkpoint.staging import staged_folder
from tests import examples

KILLS = examples(25)
LAYERS, HEIGHT, WIDTH, RANK = 8, 512, 2048, 4


@pytest.fixture(scope="module")
def large_base(tmp_path_factory) -> Path:
    """17 MB of bfloat16 weights: work enough for a kill to land in."""
    folder = tmp_path_factory.mktemp("large") / "base"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(HEIGHT, WIDTH, generator=generator).div(32).bfloat16()
    save_file({_name(layer): weight.roll(layer, 1) for layer in range(LAYERS)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def large_dora(large_base) -> Path:
    """A DoRA adapter on half of the weights."""
    folder = large_base.parent / "dora"
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(1), {}
    for layer in range(0, LAYERS, 2):
        key = f"base_model.model.{_name(layer).removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator) / 32
        tensors[f"{key}.lora_B.weight"] = torch.randn(HEIGHT, RANK, generator=generator) / 32
        tensors[f"{key}.lora_magnitude_vector"] = 1.4 + 0.1 * torch.rand(HEIGHT, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "use_dora": True, "target_modules": ".*"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def server():
    """Starts processes that have torch and mapconv in memory when they begin."""
    return multiprocessing.get_context("fork")


def assert_same(out: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        assert filecmp.cmp(out / name, expected / name, shallow=False), name


@pytest.mark.parametrize("work", [mapconv.merge, mapconv.upgrade], ids=["merge", "upgrade"])
def test_killed_at_any_moment(work, server, large_base, large_dora, tmp_path):
    out, arguments = tmp_path / "out", {"base": large_base}
    work(large_dora, tmp_path / "expected", **arguments)

    def start():
        process = server.Process(target=work, args=(large_dora, out), kwargs=arguments)
        process.start()
        return process

    started = time.perf_counter()
    whole = start()
    whole.join()
    duration = time.perf_counter() - started
    assert whole.exitcode == 0
    shutil.rmtree(out)
    moments = random.Random(0)
    landed = 0
    for kill in range(KILLS):
        victim = start()
        victim.join(duration * (kill + moments.random()) / KILLS)
        victim.kill()
        victim.join()
        assert victim.exitcode in (0, -signal.SIGKILL)
        landed += any(tmp_path.glob(".out.partial-*"))
        if out.exists():
            assert_same(out, tmp_path / "expected")
            shutil.rmtree(out)
        work(large_dora, out, **arguments)
        assert {path.name for path in tmp_path.iterdir()} == {"expected", "out"}
        assert_same(out, tmp_path / "expected")
        shutil.rmtree(out)
    assert landed, "no kill fell into the work: the test proves nothing on this machine"


def test_the_command_itself_killed_while_it_writes(run, large_base, large_dora, tmp_path):
    words = ["merge", large_dora, "--base", large_base, "-o", tmp_path / "out"]
    started = [sys.executable, "-m", "mapconv", *words]
    process = subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(tmp_path.glob(".out.partial-*/*")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    again = run(*words)
    assert again.status == 0, again.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def float8_base(large_base, tmp_path_factory) -> Path:
    """The base in float8 with a scale for each block of 128 × 128."""
    folder, tensors = tmp_path_factory.mktemp("float8"), {}
    for name, weight in load_file(large_base / "model.safetensors").items():
        blocks = weight.float().view(HEIGHT // 128, 128, WIDTH // 128, 128)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors |= {name: codes.view(HEIGHT, WIDTH), f"{name}_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return folder


@pytest.fixture
def choosing(request, tmp_path_factory):
    """An adapter and the options of a merge that chooses its values as it goes."""
    if request.param == "keep":
        base = request.getfixturevalue("float8_base")
        return request.getfixturevalue("large_dora"), {"base": base, "quantized": "keep"}
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("the cat sat on a mat, and the dog (a big one) ran to it: why? nobody knows.\n" * 200)
    base = request.getfixturevalue("half_base")
    return request.getfixturevalue("lora"), {"base": base, "rounding": "feedback", "data": text, "samples": 4}


@pytest.mark.parametrize("choosing", ["keep", "feedback"], indirect=True)
def test_a_merge_that_chooses_its_values_killed_while_it_writes(choosing, server, tmp_path):
    adapter, arguments = choosing
    out = tmp_path / "out"
    process = server.Process(target=mapconv.merge, args=(adapter, out), kwargs=arguments)
    process.start()
    while process.is_alive() and not any(tmp_path.glob(".out.partial-*/model.safetensors")):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    mapconv.merge(adapter, out, **arguments)
    mapconv.merge(adapter, tmp_path / "expected", **arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"expected", "out"}
    assert_same(out, tmp_path / "expected")


def test_an_old_result_survives_a_kill_while_its_successor_is_written(server, large_base, large_dora, tmp_path):
    """With --force, the old OUT stays whole until the new one is."""
    out = tmp_path / "out"
    mapconv.merge(large_dora, out, base=large_base)
    shutil.copytree(out, tmp_path / "expected")
    (tmp_path / "expected" / "README.md").write_text("old")
    (out / "README.md").write_text("old")
    process = server.Process(target=mapconv.merge, args=(large_dora, out), kwargs={"base": large_base, "force": True})
    process.start()
    while process.is_alive() and not any(tmp_path.glob(".out.partial-*/model.safetensors")):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert_same(out, tmp_path / "expected")


def test_a_second_run_does_not_disturb_one_that_is_writing(server, large_base, large_dora, tmp_path):
    """A staging folder belongs to its process for as long as that lives."""
    out = tmp_path / "out"
    first = server.Process(target=mapconv.upgrade, args=(large_dora, out), kwargs={"base": large_base})
    first.start()
    while first.is_alive() and not any(tmp_path.glob(".out.partial-*/*")):
        time.sleep(0.001)
    first_staging = next(tmp_path.glob(".out.partial-*"))
    with pytest.raises(mapconv.MapconvError):
        mapconv.upgrade(large_dora, out, base=large_base / "absent")
    with contextlib.suppress(KeyboardInterrupt), staged_folder(out, force=False):
        assert first_staging.exists()
        raise KeyboardInterrupt
    first.join()
    assert first.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
