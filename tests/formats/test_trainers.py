"""The files of torchtune, LitGPT and NeMo: their names, and their orders of rows, beside their own formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import AdapterError, MapconvError, UnsupportedError

HEADS, GROUPS, SIZE, WIDTH, INNER, RANK, ALPHA = 4, 2, 6, 16, 12, 3, 6.0
SHAPES = {
    "self_attn.q_proj": (HEADS * SIZE, WIDTH),
    "self_attn.k_proj": (GROUPS * SIZE, WIDTH),
    "self_attn.v_proj": (GROUPS * SIZE, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * SIZE),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
Weights = dict[str, torch.Tensor]


@pytest.fixture
def base(tmp_path) -> Path:
    (tmp_path / "base").mkdir()
    generator = torch.Generator().manual_seed(1)
    weights = {f"model.layers.0.{name}.weight": torch.randn(s, generator=generator) for name, s in SHAPES.items()}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    config = {"architectures": ["SomeForCausalLM"], "model_type": "llama"}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return tmp_path / "base"


def factors(height: int, width: int, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(height * 31 + width)
    return torch.randn(rank, width, generator=generator), torch.randn(height, rank, generator=generator)


def torchtune(folder: Path, weights: Weights, *, dora: bool = False) -> Weights:
    """Trained on weights whose q and k have the rows (place, half) of each head."""
    names = {"self_attn": "attn", "o_proj": "output_proj", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    tensors, wanted = {}, {}
    for name, (height, width) in SHAPES.items():
        rows = torch.arange(height)
        if name.endswith(("q_proj", "k_proj")):
            rows = rows.view(-1, 2, SIZE // 2).transpose(1, 2).flatten()
        own = ".".join(names.get(part, part) for part in name.split("."))
        A, B = factors(height, width)
        merged = weights[name].double()[rows] + ALPHA / RANK * B.double() @ A.double()
        if dora:
            tensors[f"layers.0.{own}.magnitude"] = magnitude = torch.linspace(1, 2, height)
            merged *= (magnitude.double() / merged.norm(dim=1))[:, None]
        tensors |= {f"layers.0.{own}.lora_a.weight": A, f"layers.0.{own}.lora_b.weight": B}
        wanted[name] = merged[rows.argsort()]
    torch.save(tensors, folder / "adapter_0.pt")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"}))
    return wanted


def litgpt(folder: Path, weights: Weights) -> Weights:
    """q and v alone are adapted, in one pair of factors."""
    tensors, wanted = {}, {}
    first, rest = factors(SHAPES["self_attn.q_proj"][0], WIDTH), factors(SHAPES["self_attn.v_proj"][0], WIDTH)
    tensors["attn.qkv.lora_A"] = torch.cat([first[0], rest[0]])
    tensors["attn.qkv.lora_B"] = torch.cat([first[1], rest[1]])
    names = {"self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2"}
    for name, (height, width) in SHAPES.items():
        A, B = factors(height, width)
        if not name.endswith("k_proj"):
            wanted[name] = weights[name].double() + ALPHA / RANK * B.double() @ A.double()
        if "qkv"[0] in name and name.endswith(("q_proj", "k_proj", "v_proj")):
            continue
        own = names.get(name, "mlp.proj")
        tensors |= {f"{own}.lora_A": A, f"{own}.lora_B": B}
    state = {f"transformer.h.0.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"model": state}, folder / "lit_model.pth.lora")
    settings = {"lora_r": RANK, "lora_alpha": ALPHA, "lora_query": True, "lora_key": False, "lora_value": True}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(settings | {"checkpoint_dir": "checkpoints/a/b"}))
    model = {"n_head": HEADS, "n_query_groups": GROUPS, "head_size": SIZE, "n_embd": WIDTH}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(model | {"mlp_class_name": "LLaMAMLP"}))
    return wanted


def nemo(folder: Path, weights: Weights) -> Weights:
    """One adapter for q, k and v in Megatron's order of rows, one for gate and up."""
    wanted, tensors = {}, {}
    blocks = [weights[f"self_attn.{part}_proj"].double().view(GROUPS, -1, SIZE, WIDTH) for part in "qkv"]
    A, B = factors((HEADS + 2 * GROUPS) * SIZE, WIDTH)
    fused = torch.cat(blocks, dim=1).view(-1, WIDTH) + ALPHA / RANK * B.double() @ A.double()
    grouped = fused.view(GROUPS, -1, SIZE, WIDTH).split([HEADS // GROUPS, 1, 1], dim=1)
    wanted |= {f"self_attn.{part}_proj": rows.reshape(-1, WIDTH) for part, rows in zip("qkv", grouped, strict=True)}
    tensors["self_attention.adapter_layer.lora_kqv_adapter"] = A, B
    A, B = factors(2 * INNER, WIDTH)
    both = (
        torch.cat([weights["mlp.gate_proj"], weights["mlp.up_proj"]]).double() + ALPHA / RANK * B.double() @ A.double()
    )
    wanted |= {"mlp.gate_proj": both[:INNER], "mlp.up_proj": both[INNER:]}
    tensors["mlp.adapter_layer.lora_hto4h_adapter"] = A, B
    A, B = factors(*SHAPES["mlp.down_proj"])
    wanted["mlp.down_proj"] = weights["mlp.down_proj"].double() + ALPHA / RANK * B.double() @ A.double()
    tensors["mlp.adapter_layer.lora_4htoh_adapter"] = A, B
    state = {}
    for name, pair in tensors.items():
        for part, tensor in zip(("in", "out"), pair, strict=True):
            state[f"model.decoder.layers.0.{name}.linear_{part}.weight"] = tensor
    torch.save(state, folder / "model_weights.ckpt")
    config = {"num_attention_heads": HEADS, "num_query_groups": GROUPS, "hidden_size": WIDTH, "kv_channels": SIZE}
    config |= {"activation": "fast-swiglu", "peft": {"lora_tuning": {"adapter_dim": RANK, "alpha": ALPHA}}}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    return wanted


WRITERS: dict[str, Callable[..., Weights]] = {"torchtune": torchtune, "LitGPT": litgpt, "NeMo": nemo}


def written(dialect: str, folder: Path, base: Path, **more: bool) -> Weights:
    folder.mkdir()
    prefix = "model.layers.0."
    weights = {name.removeprefix(prefix).removesuffix(".weight"): t for name, t in _weights(base).items()}
    return WRITERS[dialect](folder, weights, **more)


def _weights(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("dialect", "dora"), [*((name, False) for name in WRITERS), ("torchtune", True)])
def test_merged_and_upgraded(dialect, dora, base, tmp_path):
    wanted = written(dialect, tmp_path / "own", base, **({"dora": True} if dora else {}))
    found = mapconv.inspect(tmp_path / "own", base=base, allow_pickle=True)
    assert (found.dialect, found.method) == (dialect, "DoRA" if dora else "LoRA")
    mapconv.merge(tmp_path / "own", tmp_path / "merged", base=base, allow_pickle=True)
    mapconv.upgrade(tmp_path / "own", tmp_path / "map", base=base, allow_pickle=True, direction="dora")
    mapconv.merge(tmp_path / "map", tmp_path / "again", base=base)
    for folder in ("merged", "again"):
        for name, tensor in _weights(tmp_path / folder).items():
            path = name.removeprefix("model.layers.0.").removesuffix(".weight")
            expected = wanted.get(path, _weights(base)[name].double())
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-5, msg=path)


@pytest.mark.parametrize("dialect", WRITERS)
def test_pickles_need_their_flag(dialect, base, tmp_path):
    written(dialect, tmp_path / "own", base)
    with pytest.raises(UnsupportedError, match="--allow-pickle"):
        mapconv.inspect(tmp_path / "own")


def test_torchtune_s_rows_are_in_another_order_for_some_models_alone(base, tmp_path):
    written("torchtune", tmp_path / "own", base)
    place = base / "config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps(config | {"model_type": "qwen2"}))
    mapconv.merge(tmp_path / "own", tmp_path / "merged", base=base, allow_pickle=True)
    A, B = factors(*SHAPES["self_attn.q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(
        _weights(tmp_path / "merged")[name], _weights(base)[name] + ALPHA / RANK * B @ A, rtol=1e-5, atol=1e-5
    )
    place.write_text(json.dumps(config | {"model_type": "falcon"}))
    with pytest.raises(UnsupportedError, match=r'known to mapconv for gemma, .*says "falcon"'):
        mapconv.merge(tmp_path / "own", tmp_path / "other", base=base, allow_pickle=True)


def test_several_epochs_in_one_folder_and_their_files(base, tmp_path):
    wanted = written("torchtune", tmp_path / "own", base)
    (tmp_path / "own" / "adapter_1.pt").write_bytes((tmp_path / "own" / "adapter_0.pt").read_bytes())
    with pytest.raises(AdapterError, match=r"several epochs \(adapter_0.pt, adapter_1.pt\)"):
        mapconv.inspect(tmp_path / "own", allow_pickle=True)
    mapconv.merge(tmp_path / "own" / "adapter_1.pt", tmp_path / "merged", base=base, allow_pickle=True)
    name = "self_attn.k_proj"
    merged = _weights(tmp_path / "merged")[f"model.layers.0.{name}.weight"]
    torch.testing.assert_close(merged.double(), wanted[name], rtol=1e-5, atol=1e-5)


def test_torchtune_s_names_in_safetensors(base, tmp_path):
    written("torchtune", tmp_path / "own", base)
    save_file(torch.load(tmp_path / "own" / "adapter_0.pt"), tmp_path / "own" / "adapter.safetensors")
    (tmp_path / "own" / "adapter_0.pt").unlink()
    assert mapconv.inspect(tmp_path / "own").dialect == "torchtune"


@pytest.mark.parametrize(
    ("dialect", "file", "change", "message"),
    [
        ("torchtune", "adapter_config.json", {"lora_alpha": None}, "without its scaling"),
        ("LitGPT", "hyperparameters.yaml", {"lora_key": True}, r"expected 9 rows and \[48, 3\] for q_proj, k_proj"),
        ("LitGPT", "model_config.yaml", {"mlp_class_name": "GptNeoxMLP"}, 'a feed-forward layer "GptNeoxMLP"'),
        ("LitGPT", "model_config.yaml", {"n_head": "four"}, 'n_head is "four", expected a whole number'),
        ("NeMo", "model_config.yaml", {"tensor_model_parallel_size": 2}, "save the adapter with 1"),
        ("NeMo", "model_config.yaml", {"num_query_groups": 4}, "expected 72 rows for 4 heads in 4 groups"),
        ("NeMo", "model_config.yaml", {"activation": "gelu"}, "not a gated one"),
    ],
)
def test_settings_that_do_not_fit(dialect, file, change, message, base, tmp_path):
    written(dialect, tmp_path / "own", base)
    place = tmp_path / "own" / file
    table = yaml.safe_load(place.read_text()) | change
    place.write_text(json.dumps(table) if file.endswith(".json") else yaml.safe_dump(table))
    with pytest.raises(MapconvError, match=message):
        mapconv.inspect(tmp_path / "own", allow_pickle=True)


@pytest.mark.parametrize("dialect", WRITERS)
def test_files_that_lack_something(dialect, base, tmp_path):
    written(dialect, tmp_path / "own", base)
    for file in sorted((tmp_path / "own").iterdir()):
        if file.suffix == ".yaml":
            file.rename(tmp_path / "aside")
            with pytest.raises(AdapterError, match=f"{file.name} is missing"):
                mapconv.inspect(tmp_path / "own", allow_pickle=True)
            (tmp_path / "aside").rename(file)
        elif file.suffix != ".json":
            table = torch.load(file)
            state = table.get("model", table)
            state.pop(next(iter(state)))
            torch.save(table, file)
            with pytest.raises(AdapterError, match="has no counterpart"):
                mapconv.inspect(tmp_path / "own", allow_pickle=True)
            state["something.else"] = torch.ones(2, 2)
            torch.save(table, file)
            with pytest.raises(UnsupportedError, match=f"something.else is not a LoRA of {dialect} "):
                mapconv.inspect(tmp_path / "own", allow_pickle=True)
