"""No entry writes into another's folder or pushes over another's repository."""

from __future__ import annotations

import json

import pytest

import mapconv
from mapconv.errors import CatalogError, OutputError
from tests.catalog.conftest import contents, make_adapter, make_base
from tests.catalog.test_catalog_file import faults


def write_catalog(folder, *outputs, **more):
    path = folder / "catalog.jsonl"
    path.write_text("".join(json.dumps({"source": "a", "output": output} | more) + "\n" for output in outputs))
    return path


@pytest.mark.parametrize(
    ("outputs", "line", "words"),
    [
        (["songs", "songs/v2"], 2, ["'songs/v2' lies in 'songs', that of line 1"]),
        (["songs/v2", "songs"], 2, ["'songs' holds 'songs/v2', that of line 1"]),
        (["x", "a/b/c/d", "a/b"], 3, ["'a/b' holds 'a/b/c/d', that of line 2"]),
        (["songs/v2", "songs/v3", "song", "songs-v2", "songs/v22"], None, []),
        (["songs", "x", "songs"], 3, ["'songs' is taken by line 1"]),
    ],
)
def test_outputs_that_lie_in_one_another(outputs, line, words, tmp_path):
    path = write_catalog(tmp_path, *outputs)
    if line is None:
        mapconv.catalog.reading.read_catalog(path)
        return
    found = faults(path)
    assert found.keys() == {line}
    assert all(word in found[line] for word in words), found


def test_a_merged_model_has_a_folder_of_its_own(tmp_path):
    path = write_catalog(tmp_path, "songs", merge=True)
    with path.open("a") as file:
        file.write(json.dumps({"source": "a", "output": "songs-merged/v2"}) + "\n")
    assert "'songs-merged/v2' lies in 'songs-merged', that of line 1" in faults(path)[2]


def test_entries_on_one_line_of_yaml(tmp_path):
    path = tmp_path / "catalog.yaml"
    path.write_text("adapters: [{source: a}, {source: a}]\n")
    assert "'a' is taken by line 1" in faults(path)[1]


def test_an_output_is_not_replaced_while_another_lies_in_it(tmp_path):
    """Two catalogs into one folder: what the second would destroy is named."""
    adapter = make_adapter(tmp_path / "a", make_base(tmp_path / "base"))
    mapconv.convert_catalog(write_catalog(tmp_path, "songs/v2", source=str(adapter)), tmp_path / "out")
    before = contents(tmp_path / "out")
    result = mapconv.convert_catalog(write_catalog(tmp_path, "songs", source=str(adapter)), tmp_path / "out")
    (failure,) = result.failures
    assert (failure.kind, "v2/" in failure.error) == (OutputError.__name__, True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("only", [None, "b"])
@pytest.mark.parametrize("outputs", [["a/b", "b", "a-b"], ["Songs", "b", "songs"]])
def test_push_to_gives_each_entry_a_repository_of_its_own(outputs, only, tmp_path):
    path = write_catalog(tmp_path, *outputs)
    with pytest.raises(CatalogError, match=f"line 3: '{outputs[0]}' and '{outputs[2]}' would both be pushed to me/"):
        mapconv.convert_catalog(path, tmp_path / "out", push_to="me", only=only)
    assert not (tmp_path / "out").exists()


def test_push_to_of_a_folder_of_adapters(tmp_path):
    base = make_base(tmp_path / "base")
    for name in ("a/b", "a-b"):
        make_adapter(tmp_path / "adapters" / name, base)
    with pytest.raises(CatalogError) as caught:
        mapconv.convert_catalog(tmp_path / "adapters", tmp_path / "out", push_to="me")
    assert "'a/b' and 'a-b' would both be pushed to me/a-b" in str(caught.value)


def test_repositories_that_differ_in_capitals_alone(tmp_path):
    path = tmp_path / "catalog.yaml"
    path.write_text("adapters:\n- {source: a, push: {repo_id: me/Songs}}\n- source: b\n  push: {repo_id: ME/songs}\n")
    assert "the repository ME/songs is taken by line 2" in faults(path)[4]
