"""Headers of GGUF files that lie, are cut short or are mutated: one sentence of ours, at once, and no other error."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mapconv.checkpoint.gguf.header import read_gguf
from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.reader import TensorReader
from mapconv.errors import CheckpointError, MapconvError, UnsupportedError
from mapconv.placement.bases import plain_base
from tests.gguf_files import floats, save_gguf, settings_of, write_gguf
from tests.models import save_base

_CONFIG = {
    "max_position_embeddings": 512, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 64,
}  # fmt: skip
_SETTINGS = settings_of("llama", _CONFIG)
_TENSORS = {"token_embd.weight": floats(torch.ones(64, 32)), "output_norm.weight": floats(torch.ones(32))}


def error(content: bytes, tmp_path, kind: type[MapconvError] = CheckpointError) -> str:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(kind) as caught:
        read_gguf(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def content(tmp_path) -> bytes:
    return write_gguf(tmp_path / "good.gguf", _SETTINGS, _TENSORS).read_bytes()


def test_what_is_read(tmp_path):
    found = read_gguf(write_gguf(tmp_path / "a.gguf", _SETTINGS, _TENSORS))
    assert found.metadata["llama.embedding_length"] == 32
    assert found.metadata["tokenizer.ggml.tokens"] is None  # passed over
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {
        "token_embd.weight": (64, 32),
        "output_norm.weight": (32,),
    }


@pytest.mark.parametrize(
    ("start", "what", "kind"),
    [
        (b"", "ends within its header|begin", CheckpointError),
        (b"GGUF", "version", UnsupportedError),
        (b"GGML" + b"\0" * 20, "does not begin", CheckpointError),
        (b"GGUF" + struct.pack("<I", 1) + b"\0" * 40, "version 1", UnsupportedError),
        (b"GGUF" + struct.pack(">I", 3) + b"\0" * 40, "little-endian", UnsupportedError),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "claims", CheckpointError),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "claims", CheckpointError),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "a setting's name of", CheckpointError),
        (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"a", 8, 1 << 62), "claims a header of", CheckpointError),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 1 << 62), "an array of", CheckpointError),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 0, 1 << 62), "claims a header of", CheckpointError),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 5), "unknown type", CheckpointError),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77), "unknown type", CheckpointError),
        (b"GGUF" + struct.pack("<IQQQ1sIB", 3, 0, 1, 1, b"\xff", 0, 1), "UTF-8", CheckpointError),
    ],
)
def test_beginnings(start, what, kind, tmp_path):
    message = error(start, tmp_path, kind)
    assert any(part in message for part in what.split("|"))


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (((1 << 62, 1 << 62), 0, b""), "shape"),
        (((64, 0), 0, b""), "shape"),
        (((64, 33), 8, b""), "blocks of 32"),
        (((1, 1, 1, 1, 1), 0, b"\0" * 4), "dimensions"),
        (((64, 3200), 0, b"\0" * 64), "truncated"),
    ],
)
def test_shapes(tensor, what, tmp_path):
    file = write_gguf(tmp_path / "a.gguf", _SETTINGS, {"token_embd.weight": tensor})
    with pytest.raises(CheckpointError, match=what):
        read_gguf(file)


@pytest.mark.parametrize(("number", "name"), [(16, "IQ2_XXS"), (34, "TQ1_0"), (4, "number 4"), (10**6, "number")])
def test_block_types_by_name(number, name, tmp_path):
    file = write_gguf(tmp_path / "a.gguf", _SETTINGS, {"token_embd.weight": ((64, 256), number, b"\0" * 64)})
    with pytest.raises(UnsupportedError, match=name):
        read_gguf(file)


def test_every_cut(content, tmp_path):
    for length in range(0, len(content), 97):
        error(content[:length], tmp_path, MapconvError)


@pytest.mark.parametrize("alignment", [0, 3, 1 << 30])
def test_alignment(alignment, tmp_path):
    file = write_gguf(tmp_path / "a.gguf", _SETTINGS | {"general.alignment": alignment}, _TENSORS)
    with pytest.raises(CheckpointError, match=r"general\.alignment"):
        read_gguf(file)


def test_a_name_twice(tmp_path):
    tensors = dict(_TENSORS) | {"output_nora.weight": floats(torch.ones(32))}
    content = write_gguf(tmp_path / "a.gguf", _SETTINGS, tensors).read_bytes()
    twice = content.replace(b"output_nora.weight", b"output_norm.weight")
    assert "two tensors of one name" in error(twice, tmp_path)


def test_overlapping_tensors(content, tmp_path):
    # The second tensor's offset is the last number of its entry.
    place = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4
    assert "over the tensor before" in error(content[:place] + struct.pack("<Q", 32) + content[place + 8 :], tmp_path)


class TestParts:
    """A split model: all its parts, under their names."""

    def write(self, tmp_path):
        for number, name in enumerate(_TENSORS):
            table = (_SETTINGS if number == 0 else {}) | {"split.count": 2, "split.no": number}
            write_gguf(tmp_path / f"m-{number + 1:05d}-of-00002.gguf", table, {name: _TENSORS[name]})
        return tmp_path / "m-00001-of-00002.gguf"

    def test_read_as_one(self, tmp_path):
        checkpoint, config = plain_base(read_checkpoint(self.write(tmp_path)))
        assert set(checkpoint.tensors) == {"model.embed_tokens.weight", "model.norm.weight"}
        assert len(checkpoint.files) == 2
        assert config["tie_word_embeddings"] is True

    def test_refused(self, tmp_path):
        first = self.write(tmp_path)
        second = tmp_path / "m-00002-of-00002.gguf"
        with pytest.raises(CheckpointError, match="give its first part"):
            read_checkpoint(second)
        renamed = first.rename(tmp_path / "other.gguf")
        with pytest.raises(CheckpointError, match="one of 2 parts"):
            read_checkpoint(renamed)
        renamed.rename(first)
        second.write_bytes(first.read_bytes())
        with pytest.raises(CheckpointError, match="is not part 2"):
            read_checkpoint(first)
        second.unlink()
        with pytest.raises(CheckpointError, match="is not beside it"):
            read_checkpoint(first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    save_gguf(save_base(folder / "base"), folder / "model.gguf", quantized=False)
    assert json.loads((folder / "base" / "config.json").read_text())["model_type"] == "llama"
    return (folder / "model.gguf").read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_headers(data, whole, tmp_path):
    """Bytes of the header changed: it is read, down to every value, or refused by an error of ours."""
    header = whole.index(b"\0" * 16, whole.index(b"blk.1.ffn_up.weight"))
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, header))
        content[place] = data.draw(st.integers(0, 255))
    file = tmp_path / "mutated.gguf"
    file.write_bytes(content)
    try:
        checkpoint, _ = plain_base(read_checkpoint(file))
        with TensorReader() as reader:
            for ref in checkpoint.tensors.values():
                reader.read(ref)
    except MapconvError:
        pass
