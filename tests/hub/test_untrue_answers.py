"""Servers that do not send what was asked for: no byte of theirs becomes a weight, and no body goes on for ever."""

from __future__ import annotations

import json
import os
import re

import pytest

from mapconv.errors import HubError
from mapconv.hub.ranged_file import RangedFile
from tests.fake_hub_routes import Answer
from tests.hub.conftest import error_of, files_of

WIDE = "lab/wide"
WEIGHTS = "adapter_model.safetensors"
CONTENT = bytes(range(256)) * 20_000  # 5 MB, of which every 256 bytes tell where they are


def shifted(answer: Answer, by: int = 256) -> Answer:
    start, stop, size = map(int, re.findall(r"\d+", answer.headers["Content-Range"]))
    answer.headers["Content-Range"] = f"bytes {start + by}-{stop + by}/{size}"
    return answer


def short(answer: Answer) -> Answer:
    """The announced range is the right one, its body ends a thousand bytes early."""
    answer.body = answer.body[:-1000]
    return answer


def little(answer: Answer) -> Answer:
    """A true answer for the first hundred bytes alone."""
    start, _, size = map(int, re.findall(r"\d+", answer.headers["Content-Range"]))
    answer.body = answer.body[:100]
    answer.headers["Content-Range"] = f"bytes {start}-{start + 99}/{size}"
    return answer


def long(answer: Answer) -> Answer:
    answer.body += b"\0" * 1000
    return answer


def other_size(answer: Answer) -> Answer:
    answer.headers["Content-Range"] = answer.headers["Content-Range"].rpartition("/")[0] + "/9999999"
    return answer


def other_etag(answer: Answer) -> Answer:
    answer.headers |= {"ETag": '"other"', "X-Linked-Etag": '"other"'}
    return answer


def other_commit(answer: Answer) -> Answer:
    answer.headers["X-Repo-Commit"] = "f" * 40
    return answer


@pytest.mark.parametrize(
    ("pattern", "change", "named"),
    [
        ("/cdn/", shifted, "were asked for"),
        ("/cdn/", short, "of"),
        ("/cdn/", little, "100 of"),
        ("/cdn/", long, "more than the"),
        ("/cdn/", other_size, "should have"),
        ("/resolve/.*safetensors$", other_etag, "another version"),
        ("/resolve/.*safetensors$", other_commit, "the file of commit 'ffffffffffff'"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_stops_the_run(models, run, hub, tmp_path, pattern, change, named):
    hub.repo(WIDE, files_of(models.wide))
    run(hub, "inspect", models.wide_lora, "--base", WIDE)
    lies = hub.fault("GET", pattern, times=999, change=change)
    upgrade = ("upgrade", models.wide_lora, "-o", tmp_path / "out", "--base", WIDE, "--quiet")
    message = error_of(run(hub, *upgrade, status=1))
    assert named in message
    assert "run the same command again" in message
    assert not (tmp_path / "out").exists()
    # What came before the lie was true, or was thrown away.
    lies.times = 0
    run(hub, *upgrade)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (models.folder / "wide-lora-map" / WEIGHTS).read_bytes()


@pytest.fixture
def remote(hub, tmp_path, monkeypatch):
    """A file on the Hub, as this process reads it."""
    from huggingface_hub import constants

    monkeypatch.setattr("mapconv.hub.faults.FIRST_WAIT", 0.01)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.repo("lab/one", {"model.safetensors": CONTENT})
    commit = hub.store.repos["lab/one"].branches["main"]
    return RangedFile(f"{hub.url}/lab/one/resolve/{commit}/model.safetensors", tmp_path / "twin", commit)


def test_answers_of_less_than_was_asked_for_are_put_together(hub, remote):
    """A server may bring a part at a time, as long as it says so."""

    def part(answer: Answer) -> Answer:
        start, _, size = map(int, re.findall(r"\d+", answer.headers["Content-Range"]))
        answer.body = answer.body[: 2 << 20]
        answer.headers["Content-Range"] = f"bytes {start}-{start + len(answer.body) - 1}/{size}"
        return answer

    hub.fault("GET", "/cdn/", times=99, change=part)
    remote.fetch(0, len(CONTENT))
    assert remote.path.read_bytes() == CONTENT
    assert len(hub.log("GET", "/cdn/")) == 3


def test_an_endless_answer_is_cut_off(hub, remote):
    endless = hub.fault("GET", "/cdn/", times=99, endless=True)
    with pytest.raises(HubError, match="more than the 1,000 bytes that it announced"):
        remote.fetch(0, 1000)
    assert endless.times == 98
    assert sum(request.sent for request in hub.log("GET", "/cdn/")) < 64 << 20
    assert remote.missing(0, 1000) == [(0, 1000)]


def test_a_compressed_answer_is_not_taken_for_bytes_of_the_file(hub, remote):
    def packed(answer: Answer) -> Answer:
        answer.headers["Content-Encoding"] = "gzip"
        return answer

    hub.fault("GET", "/cdn/", change=packed)
    with pytest.raises(HubError, match="only whole files"):
        remote.fetch(0, 1000)


def test_links_that_others_planted_in_the_cache_are_not_written_through(hub, remote, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for name in ("twin", "twin.ranges.json", ".twin.ranges.json.partial-0123"):
        (tmp_path / name).symlink_to(precious)
    with pytest.raises(OSError, match=r"symbolic links|Too many levels"):
        remote.fetch(0, 1000)
    (tmp_path / "twin").unlink()
    remote.fetch(0, 1000)
    assert precious.read_text() == "kept"
    assert not (tmp_path / "twin.ranges.json").is_symlink()


def test_the_record_of_another_version_is_not_believed(hub, remote, tmp_path):
    remote.fetch(0, 1000)
    record = tmp_path / "twin.ranges.json"
    table = json.loads(record.read_text()) | {"etag": "another"}
    record.write_text(json.dumps(table))
    remote.read_record()
    with pytest.raises(HubError, match="another version"):
        remote.fetch(1000, 2000)
    assert not record.exists()


def test_the_folder_of_ranges_is_the_users_own(models, run, hub, tmp_path):
    hub.repo(WIDE, files_of(models.wide))
    run(hub, "inspect", models.wide_lora, "--base", WIDE)
    folders = [path.parent for path in (tmp_path / "home").rglob("*.ranges.json")]
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
    assert not any(path.is_symlink() for path in folders[0].iterdir())
    if os.getuid() == 0:
        os.chown(folders[0], 12345, -1)
        message = error_of(run(hub, "inspect", models.wide_lora, "--base", WIDE, status=1))
        assert "belongs to another user: set HF_ASSETS_CACHE" in message
