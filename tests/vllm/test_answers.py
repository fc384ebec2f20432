"""Every family and ranker: answers of vLLM under a reduction are those of thinsight on transformers.

All prompts of a case are submitted at once, four run at a time: prompts with one image, two, three and none, short and
long questions, answers of 4 to 24 tokens, so that prefills and decodes of several requests share steps.
"""

from __future__ import annotations

import pytest
from cases import CASES, Case
from engine import answers, compare, engine, references

RUNS = [(name, case) for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("name", "case"), RUNS, ids=[f"{name}-{case.name}" for name, case in RUNS])
def test_answers_are_those_of_transformers(name: str, case: Case) -> None:
    with engine(name, case) as llm:
        compare(answers(llm, name), references()[name][case.name])


def test_reductions_change_the_answers() -> None:
    """Or the tests above would prove nothing."""
    known = references()
    full = [each["ids"] for each in known["llava"]["full"]]
    for case in CASES["llava"][1:]:
        reduced = [each["ids"] for each in known["llava"][case.name]]
        assert sum(a != b for a, b in zip(full, reduced, strict=True)) >= 3, case.name
