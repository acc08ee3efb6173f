"""The tests follow the packages; tests/cli is what a user meets, tests/hub the Hub, tests/matrix every architecture.

What a test may cost: the whole suite runs in a few minutes on two cores, so a new test has about 50 ms, a new file a
few seconds.

- A subprocess loads torch, transformers and PEFT for four seconds. Commands run in the tests' own process (``run``);
  what needs a process of its own is a fork that has them loaded (``forked``). A subprocess is for what is about the
  start of a process, and there is one such test for each thing that is.
- A base or an adapter is made once and shared (``base``, ``lora``, ``dora``, ``tests/matrix``'s workshop); a test that
  changes one takes a copy. Models have two layers of 32.
- Hypothesis draws ``examples(n)``: n in the profile ``thorough``, a fifth of it in the default one. Before a release,
  and after a change to what reads strangers' files: ``python -m pytest --hypothesis-profile=thorough``.
- A test's ``tmp_path`` is gone when it has passed, and what is downloaded or cached lies in the session's own folders.
- Nothing sleeps or waits for a time: it waits for an event, with a limit that only a failure reaches.
"""

from __future__ import annotations


def examples(count: int) -> int:
    """How many examples a test of ``count`` draws in the profile that is loaded."""
    from hypothesis import settings

    return max(1, count * settings.default.max_examples // THOROUGH)


#: Examples of a test that names no number, in the profile ``thorough``, and in the default one.
THOROUGH, QUICK = 100, 20
