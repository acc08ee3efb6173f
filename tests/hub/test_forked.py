"""A fork is as a new process: it has its own environment, and nothing of the server's."""

from __future__ import annotations

from tests.environments import MARK

_FOUND = f"""
import gc, os, sys
from huggingface_hub import constants, hf_api
from transformers.utils import hub
print(constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE == os.path.join(constants.HF_HOME, "hub"))
print(hf_api.api.endpoint == constants.ENDPOINT, hub.HF_MODULES_CACHE.startswith(constants.HF_HOME))

def marked(value):
    # Written backwards, or this code is a find; after a slash, or its definition is.
    mark = "".join(reversed("{MARK[::-1]}/"))
    return isinstance(value, (str, os.PathLike)) and mark in str(value)

gc.unfreeze()
gc.collect()
for owner in gc.get_objects():
    values = owner.values() if type(owner) is dict else owner if type(owner) in (list, tuple, set) else ()
    if any(map(marked, list(values))) and set(owner) != {{"HF_HOME", "HF_ENDPOINT"}}:
        print("left", str(owner)[:300])
"""


def test_a_fork_has_its_own_environment_and_nothing_of_the_servers(python, hub, tmp_path):
    done = python(hub, _FOUND, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{hub.url} True True", "True True"]
