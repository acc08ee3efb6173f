"""Servers that send too much, too little, too slowly, other content, or the client to other hosts: for whole files."""

from __future__ import annotations

import time

import pytest

from tests.fake_hub import FakeHub
from tests.fake_hub_routes import Answer
from tests.hub.conftest import BASE_ID, adapter_files, error_of, files_of

SOURCE = "artist/poems"


@pytest.fixture
def upgrade(models, run, hub, tmp_path):
    """Run an upgrade whose adapter comes from the Hub as a whole."""
    hub.repo(SOURCE, adapter_files(models.lora, BASE_ID))
    arguments = ("upgrade", SOURCE, "-o", tmp_path / "out", "--base", models.base, "--quiet")
    return lambda **more: run(hub, *arguments, **more)


def test_a_file_of_other_content_is_refused_and_fetched_again(upgrade, hub, tmp_path):
    def damaged(answer: Answer) -> Answer:
        answer.body = answer.body[:-1] + bytes([answer.body[-1] ^ 1])
        return answer

    hub.fault("GET", "/cdn/", change=damaged)
    message = error_of(upgrade(status=1))
    assert "arrived damaged" in message
    assert not (tmp_path / "out").exists()
    upgrade()
    assert (tmp_path / "out").exists()


def test_a_file_of_another_length_is_refused(upgrade, hub, tmp_path):
    def longer(answer: Answer) -> Answer:
        answer.body += bytes(100_000)
        return answer

    hub.fault("GET", "/cdn/", times=99, change=longer)
    assert "sends more than the" in error_of(upgrade(status=1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["/cdn/", "/resolve/.*adapter_config", "/api/models/"])
def test_an_endless_body_ends(upgrade, hub, pattern):
    hub.fault("GET", pattern, times=99, endless=True, status=200, body=b"x" * 4_000_000)
    error_of(upgrade(status=1))
    assert max(request.sent for request in hub.log("GET", pattern)) < 128 << 20


@pytest.mark.parametrize("pattern", ["/cdn/", "/api/models/"])
def test_a_silent_server_is_not_waited_for(upgrade, hub, pattern):
    silent = hub.fault("GET", pattern, times=99, hold=True)
    started = time.monotonic()
    done = upgrade(status=1, TEST_REQUEST_TIMEOUT="0.5")
    assert "cannot be reached" in error_of(done)
    assert time.monotonic() - started < 25
    assert silent.reached.is_set()


def test_a_body_that_drips_is_not_waited_for(upgrade, hub):
    hub.fault("GET", "/cdn/", times=99, drip=0.05)
    assert "sent only" in error_of(upgrade(status=1, TEST_REQUEST_TIMEOUT="0.5"))


@pytest.mark.parametrize("pattern", ["/resolve/.*adapter_config", "/api/models/"])
def test_a_page_in_place_of_an_answer_is_one_sentence(upgrade, hub, tmp_path, pattern):
    page = {"status": 200, "body": b"<html><body>Log in</body></html>", "headers": {"Content-Type": "text/html"}}
    hub.fault("GET", pattern, times=99, **page)
    message = error_of(upgrade(status=1))
    assert "<html>" not in message
    assert not (tmp_path / "out").exists()


def test_a_third_host_never_sees_the_token(models, run, hub, upgrade, tmp_path):
    with FakeHub(tmp_path / "third") as third:
        away = {"status": 302, "body": b"", "headers": {"Location": f"http://localhost:{third.port}/elsewhere"}}
        for method, pattern in (("GET", "/resolve/"), ("GET", "/api/models/"), ("HEAD", "/resolve/")):
            redirect = hub.fault(method, pattern, times=99, **away)
            upgrade(status=1, home=f"home-{method}{len(pattern)}")
            redirect.times = 0
        hub.repo("lab/wide", files_of(models.wide))
        hub.fault("GET", "/resolve/.*safetensors$", times=99, **away)
        run(hub, "upgrade", models.wide_lora, "-o", tmp_path / "x", "--base", "lab/wide", status=1)
        hub.fault("POST", "/", times=99, **(away | {"status": 307}))
        run(hub, "push", models.dora_map, "me/x", "--base-id", BASE_ID, status=1)
        assert {request.method for request in third.requests} >= {"GET", "POST"}
        assert not any("authorization" in map(str.lower, request.headers) for request in third.requests)
