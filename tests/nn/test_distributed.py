"""MAP trained by two processes: DDP as accelerate starts it for a Trainer, and FSDP as far as a CPU has it."""

from __future__ import annotations

import filecmp
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.formats import read_adapter
from mapconv.nn import MapConfig, get_map_model
from tests.forked import ROOT
from tests.models import load_base, prompts
from tests.nn.test_trainers import parameters, with_trainer

CONFIG = MapConfig(rank=2, targets=("q_proj", "v_proj"))
#: The global batch is 2 rows, whichever number of processes shares them.
TRAINER = {"max_steps": 3, "save_steps": 3, "learning_rate": 1e-2, "save_only_model": True}


def fresh(base: Path) -> torch.nn.Module:
    return get_map_model(load_base(base), CONFIG).train()


def step_on(model: torch.nn.Module, rows: torch.Tensor) -> None:
    """One step on the rows' mean loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def one_of_two(rank: int, base: Path, folder: Path) -> None:
    from accelerate.state import AcceleratorState, PartialState
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not PartialState._shared_state
    model = fresh(base)
    with_trainer(model, folder / "ddp", ddp_backend="gloo", per_device_train_batch_size=1, **TRAINER).train()
    save_file(parameters(model), folder / f"ddp-{rank}.safetensors")

    model = fresh(base)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step_on(model, prompts()[rank : rank + 1])
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "fsdp", state_dict=whole)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        save_file({name: value for name, value in whole.items() if name in names}, folder / "fsdp.safetensors")


def both(base: str, folder: str) -> None:
    context = multiprocessing.get_context("fork")
    pair = [context.Process(target=one_of_two, args=(rank, Path(base), Path(folder))) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    sys.exit(any(process.exitcode for process in pair))


@pytest.fixture(scope="module")
def together(base, forked, tmp_path_factory) -> Path:
    """What two processes trained, in one folder."""
    folder = tmp_path_factory.mktemp("pair")
    # Not forks of this process: it may have started OpenMP's threads for another test, which forks would wait for.
    code = "import sys\nfrom tests.nn.test_distributed import both\nboth(*sys.argv[1:])"
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(40_000 + os.getpid() % 20_000)}
    done = forked.run(code, ["python", str(base), str(folder)], env, folder / "process")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # Adam divides by the gradient's own size, so that an entry of nearly none moves as rounding has it.
        assert float((found[name] - value).norm()) <= 1e-3 * float(value.norm()), name


def test_ddp_trains_the_weights_of_one_process(base, together, tmp_path):
    model = fresh(base)
    with_trainer(model, tmp_path / "alone", per_device_train_batch_size=2, **TRAINER).train()
    first, second = (load_file(together / f"ddp-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_alike(first, parameters(model))
    assert read_adapter(together / "ddp" / "checkpoint-3").method == "MAP"


def test_fsdp_shards_train_to_the_same_weights_and_are_saved_whole(base, together, tmp_path):
    model = fresh(base)
    step_on(model, prompts()[:2])
    trained = load_file(together / "fsdp.safetensors")
    assert_alike(trained, parameters(model))
    # The MAP directory is that of the whole values.
    model.load_state_dict(trained, strict=False)
    mapconv.save_adapter(model, tmp_path / "whole")
    for name in ("adapter_model.safetensors", "map_config.json"):
        assert filecmp.cmp(tmp_path / "whole" / name, together / "fsdp" / name, shallow=False)
