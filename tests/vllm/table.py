"""The table of families and rankers in docs/serving.md, from results: `python table.py results.xml docs/serving.md`.

Writes nothing unless every case that should have run is there and passed.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from cases import CASES, prompts_of
from checkpoints import CHECKPOINTS

from thinsight.families import FAMILIES
from thinsight.vllm.plan import SERVED

BEGIN, END = "<!-- vllm:begin -->", "<!-- vllm:end -->"
TEST = "test_answers_are_those_of_transformers"


def passed(path: Path) -> set[str]:
    """Names of the cases that passed, such as "llava-stairs"."""
    found = set()
    for case in ElementTree.parse(path).iter("testcase"):
        name = case.get("name", "")
        if name.startswith(f"{TEST}[") and len(case) == 0:
            found.add(name.removeprefix(f"{TEST}[").removesuffix("]"))
    return found


def table(done: set[str]) -> str:
    """The Markdown table: every checkpoint, with what passed for it; every class that is served has one."""
    missing = [
        f"{name}-{case.name}" for name, cases in CASES.items() for case in cases if f"{name}-{case.name}" not in done
    ]
    if missing:
        raise SystemExit(f"these did not pass: {', '.join(missing)}")
    unseen = SERVED.keys() - {each.model_class for name, each in CHECKPOINTS.items() if name in CASES}
    if unseen:
        raise SystemExit(f"no case runs {', '.join(sorted(unseen))}")
    lines = ["| family | class in vLLM | decoder | tried with | reductions with the answers of transformers |"]
    lines.append("|---|---|---|---|---|")
    for name, checkpoint in CHECKPOINTS.items():
        family = checkpoint.title or FAMILIES[SERVED[checkpoint.model_class].model_type].name
        decoder = checkpoint.config["text_config"]["model_type"].removesuffix("_text")
        cases = [case for case in CASES[name] if case.rates is not None]
        rankers = sorted({str(dict(case.ranker)["name"]) for case in cases})
        kinds = {"videos" if prompt.videos else "images" for prompt in prompts_of(name) if prompt.images}
        row = [family, f"`{checkpoint.model_class}`", decoder, ", ".join(sorted(kinds))]
        lines.append(f"| {' | '.join(row)} | {len(cases)}: {', '.join(rankers)} |")
    return "\n".join(lines)


def main(results: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n\n{table(passed(results))}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
