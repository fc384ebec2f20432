"""The house: imports run one way, so that every file can be understood from those below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import thinsight

SOURCE = Path(thinsight.__file__).parent
FILES = {
    ".".join(("thinsight", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}


def imported(node: ast.AST, package: list[str]) -> Iterator[str]:
    """Modules of ours that a module needs when it runs, wherever it imports them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and child.level:
            start = [*package[: len(package) - child.level + 1], *(child.module or "").split(".")]
            base = ".".join(filter(None, start))
            for alias in child.names:
                name = f"{base}.{alias.name}"
                yield name if name in FILES else base
        else:
            yield from imported(child, package)


def graph() -> dict[str, set[str]]:
    result = {}
    for name, path in FILES.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        result[name] = {*imported(ast.parse(path.read_text(encoding="utf-8")), package)} - {name}
    return result


def test_no_import_goes_round_in_a_circle() -> None:
    order = list(TopologicalSorter(graph()).static_order())  # raises CycleError where there is none
    assert {*FILES} <= {*order}


def test_what_is_experimental_is_reached_by_name_only() -> None:
    """From the front door and from a registry."""
    inside = "thinsight.experimental"
    users = {name for name, others in graph().items() if any(each.startswith(inside) for each in others)}
    assert "thinsight.searches.run" in graph()[f"{inside}.adaptive"]
    assert [name for name in users if not name.startswith(inside)] == []


def test_the_plugin_of_vllm_is_reached_by_its_entry_point_only() -> None:
    users = {name for name, others in graph().items() if any(each.startswith("thinsight.vllm") for each in others)}
    assert "thinsight.vllm.model" in users
    assert [name for name in users if not name.startswith("thinsight.vllm")] == []


def test_rooms_know_only_those_below() -> None:
    """CONTRIBUTING's list, the topmost room first; what stands in no room of it is below them all."""
    rooms = (
        "testing",
        "cli",
        "console",
        "lmms_eval",
        "vlmevalkit",
        "harness",
        "serving",
        "job",
        "report",
        "vllm",
        "experimental",
        "searches",
        "checking",
        "evaluation",
        "baselines",
        "runtime",
        "ranking",
        "convert",
    )

    def floor(module: str) -> int:
        room = module.removeprefix("thinsight").strip(".").split(".")[0]
        return rooms.index(room) if room in rooms else len(rooms)

    upwards = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if floor(module) < len(rooms) and floor(other) < floor(module)
    ]
    assert upwards == []
