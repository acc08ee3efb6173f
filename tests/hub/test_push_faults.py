"""Everything that goes wrong between a push and the Hub: repeated where that is safe, else one sentence."""

from __future__ import annotations

import socket

import pytest

from tests.fake_hub import READ_TOKEN, WRITE_TOKEN
from tests.hub.conftest import BASE_ID, error_of, files_of

RESULT = ("me/x", "--base-id", BASE_ID)
PROXY = {"body": b"<html>Bad Gateway</html>", "headers": {"Content-Type": "text/html"}}


@pytest.mark.parametrize(
    ("method", "pattern", "fault"),
    [
        ("GET", "/api/models/me/x$", {"status": 503}),
        ("POST", "/repos/create", {"status": 503}),
        ("POST", "/repos/create", {"status": 429, "headers": {"Retry-After": "0"}}),
        ("POST", "/repos/create", {"drop": True}),
        ("POST", "/repos/create", {"drop": True, "after": True}),
        ("POST", "/validate-yaml", {"status": 500}),
        ("POST", "/validate-yaml", {"status": 502} | PROXY),
        ("POST", "/commit/", {"status": 503}),
        ("POST", "/commit/", {"status": 429, "headers": {"Retry-After": "0"}}),
        ("POST", "/commit/", {"drop": True}),
        ("POST", "/commit/", {"drop": True, "after": True}),
        ("POST", "/commit/", {"status": 504, "after": True}),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)
def test_a_passing_fault_is_repeated_and_makes_one_commit(models, run, hub, method, pattern, fault):
    expected = hub.fault(method, pattern, **fault)
    done = run(hub, "push", models.dora_map, *RESULT)
    assert expected.reached.is_set()
    repo = hub.store.repos["me/x"]
    assert len(repo.commits) == 2  # the one that the Hub makes for a new repository, and ours
    assert repo.resolve("main").sha in done.stdout
    assert "adapter_model.safetensors" in repo.resolve("main").files


@pytest.mark.parametrize(
    ("method", "pattern", "fault", "words", "finishes"),
    [
        ("POST", "/repos/create", {"status": 503, "times": 9}, ["trouble (503)", "again later"], True),
        ("POST", "/validate-yaml", {"status": 200, "times": 9} | PROXY, ["does not answer as the Hub", "proxy"], False),
        ("POST", "/validate-yaml", {"status": 200, "times": 9, "body": b"[1]"}, ["does not answer as the Hub"], False),
        (
            "POST", "/validate-yaml",
            {"status": 400, "body": b'{"errors": [{"message": "license is unknown"}]}'},
            ["model card", "license is unknown"], False,
        ),
        ("POST", "/preupload/", {"status": 403}, ["may not write to me/x (403", "settings/tokens"], False),
        ("POST", "/commit/", {"status": 409}, ["is in progress (409)", "same command again"], False),
        ("POST", "/commit/", {"status": 412, "times": 9}, ["keeps committing", "(412)"], False),
        ("POST", "/commit/", {"status": 413}, ["too large (413)"], False),
        ("POST", "/commit/", {"status": 429, "headers": {"Retry-After": "300"}}, ["(429)", "300 seconds"], False),
        ("POST", "/commit/", {"status": 500, "times": 9}, ["trouble (500)"], True),
        ("POST", "/commit/", {"drop": True, "times": 9}, ["cannot be reached", "HF_ENDPOINT"], False),
        ("PUT", "/cdn/", {"status": 403}, ["403"], True),
        ("POST", "/lfs-verify/", {"status": 404}, ["404"], False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_lasting_fault_is_one_sentence_and_the_same_command_finishes_later(
    models, run, hub, method, pattern, fault, words, finishes
):
    lasting = hub.fault(method, pattern, **fault)
    message = error_of(run(hub, "push", models.dora_map, *RESULT, status=1))
    for word in ["me/x", *words]:
        assert word in message
    repo = hub.store.repos.get("me/x")
    assert repo is None or len(repo.commits) == 1  # nothing of ours is visible
    if finishes:
        lasting.times = 0
        run(hub, "push", models.dora_map, *RESULT)
        assert "README.md" in hub.files("me/x")


def test_a_hub_that_falls_silent_is_given_up_and_the_next_run_finishes(models, run, hub):
    silent = hub.fault("POST", "/validate-yaml", times=9, hold=True)
    message = error_of(run(hub, "push", models.dora_map, *RESULT, status=1, TEST_REQUEST_TIMEOUT="0.7"))
    assert "cannot be reached (ReadTimeout)" in message
    silent.times = 0
    silent.release.set()
    run(hub, "push", models.dora_map, *RESULT)


def test_nobody_listens(models, run, hub):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
        message = error_of(run(hub, "push", models.dora_map, *RESULT, status=1, HF_ENDPOINT=closed))
    assert closed in message
    assert "cannot be reached" in message


def test_offline_mode_is_named(models, run, hub):
    message = error_of(run(hub, "push", models.dora_map, *RESULT, status=1, HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE" in message
    assert hub.connections == 0


@pytest.mark.parametrize(
    ("token", "name", "words"),
    [
        (None, "me/x", ["needs a token (401)", "hf auth login", "--token"]),
        ("hf_unknownTokenOfNobody", "me/x", ["does not accept the token", "(401)"]),
        (READ_TOKEN, "me/x", ["may not write to me/x (403"]),
        (WRITE_TOKEN, "somebody/x", ["may not write to somebody/x (403", "a name of your own"]),
    ],
)
def test_who_may_not_push_reads_why(models, run, hub, token, name, words):
    done = run(hub, "push", models.dora_map, name, "--base-id", BASE_ID, status=1, token=token)
    for word in words:
        assert word in error_of(done)
    assert name not in hub.store.repos


def test_the_token_option_wins_over_the_environment(models, run, hub):
    run(hub, "push", models.dora_map, *RESULT, "--token", WRITE_TOKEN, token=READ_TOKEN)
    assert "README.md" in hub.files("me/x")


@pytest.mark.parametrize("status", [401, 500])
def test_a_failing_xet_store_is_named_and_the_next_run_finishes(models, run, xet_hub, status):
    failing = xet_hub.fault("GET", "/xet-write-token/", status=status, times=99)
    impatient = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
    message = error_of(run(xet_hub, "push", models.dora_map, *RESULT, status=1, **impatient))
    assert "Xet" in message
    assert "HF_HUB_DISABLE_XET=1" in message
    failing.times = 0
    run(xet_hub, "push", models.dora_map, *RESULT)
    assert "README.md" in xet_hub.files("me/x")


def test_large_files_go_in_parts(models, run, tmp_path):
    from tests.fake_hub import FakeHub

    with FakeHub(tmp_path / "server", part_size=100_000) as hub:
        run(hub, "push", models.merged, *RESULT)
        assert len(hub.log("PUT", "/cdn/")) > 1
        assert hub.content("me/x", "model.safetensors") == (models.merged / "model.safetensors").read_bytes()


def test_a_concurrent_commit_is_built_upon(models, run, start, hub):
    """Somebody commits after we have read the head: the Hub says 412, and nothing of theirs is lost."""
    repo = hub.repo("me/x", {"README.md": b"# Old\n"})
    held = hub.fault("POST", "/preupload/", hold=True)
    process = start(hub, "push", models.dora_map, *RESULT)
    assert held.reached.wait(30)
    hub.store.add_files(repo, {"README.md": b"# Old\n\nAdded meanwhile.\n", "theirs.txt": b"kept"})
    held.release.set()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert [request.status for request in hub.log("POST", "/commit/")] == [412, 200]
    assert hub.content("me/x", "theirs.txt") == b"kept"
    assert b"Added meanwhile." in hub.content("me/x", "README.md")


def test_two_pushes_at_once_leave_one_whole_result(models, start, hub):
    processes = [start(hub, "push", models.dora_map, *RESULT, home=f"home{n}") for n in range(2)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert set(files_of(models.dora_map)) <= set(hub.files("me/x"))
    assert len(hub.store.repos["me/x"].commits) == 2


@pytest.mark.parametrize("landed", [False, True], ids=["before", "during"])
def test_a_killed_push_is_finished_by_the_next(models, run, start, hub, landed):
    held = hub.fault("POST", "/commit/", hold=True, after=landed)
    process = start(hub, "push", models.dora_map, *RESULT)
    assert held.reached.wait(30)
    process.kill()
    process.wait(30)
    if not landed:
        held.drop = True  # the request dies with its sender
    held.release.set()
    repo = hub.store.repos["me/x"]
    assert ("README.md" in repo.resolve("main").files) is landed
    done = run(hub, "push", models.dora_map, *RESULT)
    assert ("nothing to send" in done.stdout) is landed
    assert len(repo.commits) == 2
    assert len(hub.log("PUT", "/cdn/")) == 1  # the weights had arrived before the kill


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(models, run, hub):
    run(hub, "push", models.dora_map, *RESULT)
    arguments = ("push", models.dora_map, *RESULT, "--license", "mit", "--create-pr")
    hub.fault("POST", "/commit/", drop=True, after=True)
    message = error_of(run(hub, *arguments, status=1))
    assert "/me/x/discussions" in message
    assert hub.store.repos["me/x"].pull_requests == 1
    hub.fault("POST", "/commit/", status=429, headers={"Retry-After": "0"})
    run(hub, *arguments)  # refused before it did anything: safe to repeat
    assert hub.store.repos["me/x"].pull_requests == 2


def test_the_token_shows_nowhere(models, run, python, hub):
    """In no output and no traceback, even one with local variables; ``run`` searches the output of every other test."""
    failing = hub.fault("POST", "/commit/", status=400, times=99)
    done = run(hub, "push", models.dora_map, *RESULT, "--token", WRITE_TOKEN, status=1, MAPCONV_DEBUG="1")
    assert "Traceback" in done.stderr
    code = _TRACEBACK.format(path=str(models.dora_map), base=BASE_ID, token=WRITE_TOKEN)
    done = python(hub, code, token=None)
    assert "HubError" in done.stdout, done.stderr
    assert "models.dora_map" not in done.stdout
    assert WRITE_TOKEN not in done.stdout + done.stderr
    failing.times = 0
    run(hub, "push", models.dora_map, *RESULT)
    for path in hub.files("me/x"):
        assert WRITE_TOKEN.encode() not in hub.content("me/x", path)
    assert any(WRITE_TOKEN in str(request.headers) for request in hub.requests)  # the search can find it
    assert not any(WRITE_TOKEN in str(request.headers) for request in hub.log("PUT", "/cdn/"))


_TRACEBACK = """
import traceback
import mapconv
arguments = dict(base_id={base!r}, token="".join([{token!r}]))
try:
    mapconv.push({path!r}, "me/x", **arguments)
except mapconv.MapconvError as error:
    report = traceback.TracebackException.from_exception(error, capture_locals=True)
    report.stack.pop(0)  # this script's own frame has the token
    print("".join(report.format()))
    assert error.__cause__ is None and error.__context__ is None
"""
