"""MAP under transformers.Trainer and TRL's SFTTrainer: what they save, how they resume, and what is refused."""

from __future__ import annotations

import filecmp
import shutil
import statistics

import pytest
import torch
from safetensors.torch import load_file

import mapconv
from mapconv.errors import AdapterError, OutputError, UnsupportedError
from mapconv.formats import read_adapter
from mapconv.nn import MapConfig, detach, get_map_model, load_adapter, map_layers, set_adapter
from tests.models import load_adapted, load_base, log_probabilities, prompts
from tests.nn.test_running import close

COMMON = {
    "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
    "report_to": [], "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in prompts().repeat(count, 1)[:count]]


def with_trainer(model, folder, evaluated=None, **settings):
    from transformers import Trainer, TrainingArguments  # a second, for datasets and pandas: not for each worker

    arguments = TrainingArguments(output_dir=str(folder), **COMMON | settings)
    return Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=evaluated)


def with_sft(model, folder, **settings):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    arguments = trl.SFTConfig(output_dir=str(folder), max_length=None, **COMMON | settings)
    return trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=a_tokenizer())


def a_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)} | {"<eos>": 64}, "w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def test_a_trainer_logs_how_far_the_weights_moved(base, tmp_path):
    from mapconv.nn.callbacks import LogUpdateSizes

    model = get_map_model(load_base(base), MapConfig(rank=2, targets=("q_proj", "v_proj"), beta="relative", eps=1e-6))
    trainer = with_trainer(model, tmp_path, max_steps=2)
    trainer.add_callback(LogUpdateSizes())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    moved = []
    for layer in map_layers(model).values():
        weight = layer.base_layer.weight.detach()
        a, _ = layer.gains("default")
        change = layer.merged_weight(layer.update("default"), torch.float32) - a * weight
        moved.append(float(change.norm() / weight.norm()))
    assert logged[-1]["update_size_median"] == pytest.approx(statistics.median(moved), rel=1e-5)
    assert logged[-1]["update_size_q1"] <= logged[-1]["update_size_median"] <= logged[-1]["update_size_q3"]


RUNS = {
    "trainer": (with_trainer, torch.float32, {"gradient_checkpointing": True}),
    "SFT": (with_sft, torch.bfloat16, {"bf16": True, "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("run", RUNS)
def test_an_interrupted_run_resumes_to_the_same_weights(base, tmp_path, run):
    """With nothing but get_map_model; the checkpoints are MAP directories, whole and loadable by stock PEFT."""
    make, dtype, settings = RUNS[run]
    model = get_map_model(load_base(base, dtype), MapConfig(rank=4))
    trainer = make(model, tmp_path / "run", **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    through = parameters(model)

    again = get_map_model(load_base(base, dtype), MapConfig(rank=4))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    make(again, tmp_path / "run", **settings).train(resume_from_checkpoint=True)
    resumed = parameters(again)
    assert through.keys() == resumed.keys()
    assert all(torch.equal(through[name], resumed[name]) for name in through)

    trainer.save_model()  # into the folder that holds the checkpoints
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4"):
        assert read_adapter(folder).method == "MAP"
        if dtype is torch.float32:
            live = log_probabilities(model.eval())
            assert close(log_probabilities(load_adapted(base, folder)), live)
            assert close(log_probabilities(load_adapter(load_base(base), folder)), live)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    state = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert state.keys() == through.keys()


def test_the_best_checkpoint_is_loaded_at_the_end(base, tmp_path):
    model = get_map_model(load_base(base), MapConfig(rank=4))
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 50.0}
    trainer = with_trainer(model, tmp_path, evaluated=rows(2), **settings)
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(best[name], value) for name, value in parameters(model).items())
    # A state of adapters alone lacks nothing; one that lacks a part of them lacks that.
    assert model.load_state_dict(best, strict=False).missing_keys == []
    lost = best.popitem()[0]
    assert lost in model.load_state_dict(best, strict=False).missing_keys


@pytest.mark.parametrize("other", [{"units": "absolute"}, {"targets": ("v_proj", "q_proj")}, {"direction": "dora"}])
def test_a_checkpoint_of_another_configuration_is_refused(base, tmp_path, other):
    """Trainer loads it with ``strict=False``, and would go on with what fits of it."""
    settings = {"rank": 2, "targets": ("q_proj",)}
    model = get_map_model(load_base(base), MapConfig(**settings | other))
    model.save_pretrained(tmp_path / "checkpoint-2")
    state = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    with pytest.raises(AdapterError, match=r"which this model has not: make the model with the MapConfig of the run"):
        get_map_model(load_base(base), MapConfig(**settings)).load_state_dict(state, strict=False)


def test_save_pretrained_is_save_adapter_until_the_adapter_goes(base, tmp_path):
    model = load_base(base)
    get_map_model(model, MapConfig(rank=2))
    model.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "a", max_shard_size="1GB")
    mapconv.save_adapter(model, tmp_path / "b")
    (tmp_path / "a" / "mine.txt").write_text("stays")
    model.save_pretrained(tmp_path / "a")  # again, over the first
    same, differ, missing = filecmp.cmpfiles(
        tmp_path / "a", tmp_path / "b", [path.name for path in (tmp_path / "b").iterdir()], shallow=False
    )
    assert len(same) == 4
    assert not differ + missing
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([*same, "mine.txt"])
    with pytest.raises(TypeError, match="'push_to_hub'"):
        model.save_pretrained(tmp_path / "c", push_to_hub=True)
    set_adapter(model, None)
    with pytest.raises(AdapterError, match="no adapter is active"):
        model.save_pretrained(tmp_path / "c")
    detach(model)
    model.save_pretrained(tmp_path / "c")
    assert (tmp_path / "c" / "config.json").exists()
    assert not model._load_state_dict_post_hooks


def test_whole_values_stand_in_for_shards(base, tmp_path):
    """As FSDP has it: the model's own parameters are empty, and the values come beside it."""
    model = load_adapter(load_base(base), make_map(base, tmp_path), trainable="all")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    mapconv.save_adapter(model, tmp_path / "whole")
    sharded = {name: value for name, value in model.named_parameters() if "layers" in name}
    for parameter in sharded.values():
        parameter.data = parameter.data.new_empty(0)
    model.save_pretrained(tmp_path / "gathered", state_dict=values)
    for name in ("adapter_model.safetensors", "map_config.json"):
        assert filecmp.cmp(tmp_path / "whole" / name, tmp_path / "gathered" / name, shallow=False)
    assert all(parameter.numel() == 0 for parameter in sharded.values())


def make_map(base, tmp_path):
    model = get_map_model(load_base(base), MapConfig(rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return mapconv.save_adapter(model, tmp_path / "map")


def test_a_head_that_a_fused_loss_passes_by_is_refused(base, tmp_path):
    model = get_map_model(load_base(base), MapConfig(rank=2, targets=["q_proj", "lm_head"]))
    with_trainer(model, tmp_path / "plain").train()  # transformers' own loss runs the layer
    with pytest.raises(UnsupportedError, match="leave lm_head out of the targets"):
        with_sft(model, tmp_path / "fused").train()


def test_a_quantized_base_is_refused(base):
    model = load_base(base)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match="load the 16- or 32-bit model"):
        get_map_model(model, MapConfig(rank=2))
    assert not {"_map_state", "save_pretrained"} & vars(model).keys()


def test_a_file_in_the_folders_place_is_refused(base, tmp_path):
    model = get_map_model(load_base(base), MapConfig(rank=2))
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OutputError, match="is not a folder"):
        model.save_pretrained(tmp_path / "taken")
