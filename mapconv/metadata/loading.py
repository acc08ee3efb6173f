"""The part of a model card that says how to load what it is of."""

from __future__ import annotations

from mapconv.metadata.markdown import python_code

_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": (None, "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}


def pipeline_of(task: str | None) -> str | None:
    """The Hub's ``pipeline_tag`` for a task of PEFT's."""
    return _TASKS.get(task or "", (None, ""))[0]


def how_to_load(task: str | None, repo_id: str | None, base: str | None, *, merged: bool, by_peft: bool) -> str:
    """The section of a merged model, or of an adapter that stock PEFT loads, or that mapconv alone does.

    Args:
        task: PEFT's name of the model's task, for its class.
        repo_id, base: the Hub ids, where they are known.
    """
    auto = _TASKS.get(task or "", ("", "AutoModelForCausalLM"))[1]
    name, base = repo_id or "path/to/this/folder", base or "path/to/the/base"
    if merged:
        return python_code(
            "## How to load it", f"from transformers import {auto}", f'model = {auto}.from_pretrained("{name}")'
        )
    load = python_code(
        "## How to load it\n\nWith PEFT:",
        f"from peft import PeftModel\nfrom transformers import {auto}",
        f'base = {auto}.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "{name}")',
    )
    if not by_peft:
        load = python_code(
            "## How to load it\n\nWith mapconv:",
            f"from mapconv import load_adapter\nfrom transformers import {auto}",
            f'model = load_adapter({auto}.from_pretrained("{base}"), "{name}")',
        )
    inspect = (
        "With mapconv, which shows its scalars and checks that it fits:\n\n"
        f"```\nmapconv inspect {name} --base {base}\n```"
    )
    merge = python_code(
        f"Merged into the base, with no adapter left to run:\n\n```\nmapconv merge {name} -o merged\n```",
        f"from transformers import {auto}",
        f'model = {auto}.from_pretrained("merged")',
    )
    return "\n\n".join([load, inspect, merge])
