"""The front door: which names there are, that Python and type checkers see the same, and how objects look."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_images, tiny_llava, tiny_processor

import thinsight as ts
from benchmarks.simulated import SimulatedTransport
from thinsight.budget import FlopsBudget, KeepBudget, LatencyModel, TimeBudget
from thinsight.schedule import Adaptive
from thinsight.searches.run import Trial
from thinsight.timing import Measurement, Timing

SOURCE = Path(ts.__file__)
NAMES = {
    "Adaptive", "Answerer", "BadInput", "CapturedPrefill", "Evaluation", "Evaluator", "Example",
    "Frontier", "Handle", "MissingPackage", "Pool", "RankConsistency", "Ranker", "Reduction",
    "Schedule", "SearchResult", "StorageError", "SupportedModel", "ThinsightError", "Unreachable",
    "Unsupported", "__version__", "adaptive_search", "apply", "baselines", "budget", "cost",
    "drop_interval", "encode_images", "errors", "frontier", "get_ranker", "gsearch", "list_rankers",
    "load_demo", "load_examples", "load_model", "models", "paired_bootstrap", "psigmoid",
    "random_search", "rank_consistency", "search", "sensitivity_search", "timing",
}  # fmt: skip


def names_of_type_checkers() -> dict[str, str]:
    """Of the block that only type checkers read: each name with the module that it is imported from."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    found = {}
    for line in block.body:
        if isinstance(line, ast.ImportFrom) and line.level == 1:
            for each in line.names:
                assert each.asname == each.name  # which is how a name is exported to them
                found[each.name] = line.module or ""
    return found


def test_names_are_fixed() -> None:
    """They are added to, never renamed."""
    assert set(ts.__all__) >= NAMES


def test_python_and_type_checkers_see_the_same_names() -> None:
    assert sorted({*names_of_type_checkers(), "__version__"}) == sorted(ts.__all__) == dir(ts)
    assert len(set(ts.__all__)) == len(ts.__all__)


def test_every_name_is_what_type_checkers_take_it_for() -> None:
    for name, home in names_of_type_checkers().items():
        found = getattr(ts, name)
        if home:
            module = importlib.import_module(f"thinsight.{home}")
            assert found is getattr(module, name), name
        else:
            assert isinstance(found, ModuleType)
            assert found is importlib.import_module(f"thinsight.{name}")


def test_no_other_name_is_there() -> None:
    with pytest.raises(AttributeError, match="module 'thinsight' has no attribute 'sarch'"):
        _ = ts.sarch


def described(name: str, thing: Any) -> Iterator[tuple[str, str]]:
    """What an API reference shows of a public name: it, what it holds, and the docstring of each."""
    if isinstance(thing, ModuleType):
        for each, inner in vars(thing).items():
            if not each.startswith("_") and getattr(inner, "__module__", "") == thing.__name__:
                yield from described(f"{name}.{each}", inner)
    elif inspect.isclass(thing):
        defaults = getattr(thing, "__dataclass_fields__", {})
        for each, inner in vars(thing).items():
            method = isinstance(inner, (FunctionType, classmethod, staticmethod, property)) and each not in defaults
            if method and not each.startswith("_"):
                yield f"{name}.{each}", inspect.getdoc(getattr(thing, each)) or ""
    elif not inspect.isfunction(thing):
        return
    yield name, thing.__doc__ or ""


def test_every_public_name_and_method_is_described() -> None:
    found = {key: text for name in ts.__all__ for key, text in described(name, getattr(ts, name))}
    assert {"Reduction.save_pretrained", "budget.KeepBudget.limit", "timing.measure", "Schedule"} <= set(found)
    # a dataclass without a docstring has its signature as one
    assert [name for name, text in found.items() if not text or text.startswith(f"{name.split('.')[-1]}(")] == []


def test_the_front_door_loads_nothing_heavy() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(SOURCE.parent.parent)!r}); import thinsight, thinsight.errors\n"
        "dir(thinsight); thinsight.BadInput, thinsight.Schedule, thinsight.budget.KeepBudget\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- how objects look ----------------------------------------------------------------------------------------

LONG = "long \x1b[2J\n" * 500
STAIRS = ts.Schedule([1 - i / 200 for i in range(101)])
FAMILY = Adaptive("concentration", 1, (0.1, 0.2), (STAIRS, STAIRS, STAIRS), (0.25, 0.5, 0.25))
REDUCTION = ts.Reduction(
    STAIRS,
    {"name": LONG, "first": LONG},
    base_model_name_or_path=LONG,
    model_type=LONG,
    search={"trials": [LONG] * 99},
    measured={"device": LONG},
    adaptive=FAMILY,
    rerank=0.5,
)
LATENCY = LatencyModel("cuda", "float32", 8, 0.001, tuple(range(500)), tuple(range(500)))
SHAPE = ts.cost.decoder_shape(tiny_llava().config)
TIMING = Timing("prefill", (1.0,) * 500, (0.5,) * 500, 8)


def trial(number: int = 0) -> Trial:
    return Trial(
        None, 0.5, 9, 0.5 + number / 1e6, True, True, STAIRS, why=LONG, reduction=ts.Reduction(STAIRS, {"name": LONG})
    )


def result(**changes: Any) -> ts.SearchResult:
    trials = tuple(map(trial, range(200)))
    made = ts.SearchResult(STAIRS, REDUCTION, trials, "gsearch", 0.01, 0.9, 0.895, 0)
    return replace(made, **changes)


def everything() -> dict[str, Any]:
    model, processor = tiny_llava(), tiny_processor()
    image = tiny_images(1)[0]
    examples = [ts.Example(LONG, (image,), "what color ?", metric="agreement")]
    evaluator = ts.Evaluator(model, processor, examples, max_new_tokens=2)
    budget = KeepBudget(101, 16, 0.5).to_dict()
    many = np.full(500, 0.5)
    return {
        "Schedule": STAIRS,
        "Adaptive": FAMILY,
        "Reduction": REDUCTION,
        "Trial": trial(),
        "SearchResult": result(),
        "SearchResult under a budget": result(max_drop=None, budget=budget, spent=0.5),
        "Frontier": ts.Frontier(tuple(result(spent=0.1 * i) for i in range(9)), 0.9, 40.0),
        "empty Frontier": ts.Frontier((), 0.9, 0.0),
        "Evaluation": ts.Evaluation(1 / 3, many, False, 2 / 3, 1e11 / 3, 1 / 7, 1 / 7),
        "Evaluator": evaluator,
        "Pool": ts.Pool(transport=SimulatedTransport(lambda: evaluator, 64)),
        "Example": ts.Example(LONG, ("a.png", image) * 50, LONG, (LONG,) * 50, extra={"task": LONG}),
        "RankConsistency": ts.RankConsistency(many, np.full((501, 501), 0.5), many, np.full(501, 0.5), 0.25, 64),
        "Handle": ts.apply(model, ts.Schedule.step(4, 2, 0.5)),
        "LatencyModel": LATENCY,
        "KeepBudget": KeepBudget(32, 576, 0.25),
        "FlopsBudget": FlopsBudget(SHAPE, 576, 40, 1e12 / 3),
        "TimeBudget": TimeBudget(LATENCY, 32, 576, 40, 80.0),
        "Timing": TIMING,
        "Measurement": Measurement((TIMING,) * 3, 3, 1, 8, 16, "cuda", "float32", 2),
        "Ranker": ts.get_ranker("text-attention"),
        "SupportedModel": ts.models()[0],
    }


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    return {name: repr(each) for name, each in everything().items()}


def test_objects_are_one_short_line(shown: dict[str, str]) -> None:
    for name, line in shown.items():
        assert len(line) < 300, (name, line)
        assert line.isprintable(), (name, line)
        assert line.startswith(name.split()[0].removeprefix("empty")) or name in ("Ranker", "empty Frontier"), line


def test_what_objects_say(shown: dict[str, str]) -> None:
    assert repr(ts.Schedule.step(32, 2, 0.25)) == "Schedule([1.0 x2, 0.25 x30])"
    assert repr(ts.Schedule([1, 0.5, 1 / 3, 0])) == "Schedule([1.0, 0.5, 0.3333, 0.0])"
    wanted = "Schedule([1.0, 0.995, 0.99, 0.985, ..., 0.505, 0.5], 101 layers, mean 0.75)"
    assert shown["Schedule"] == wanted
    plain = ts.Reduction(ts.Schedule.full(4), {"name": "random", "seed": 1}, model_type="llava")
    assert repr(plain) == "Reduction(Schedule([1.0 x4]), ranker 'random', seed=1, for 'llava')"
    assert shown["SearchResult"] == (
        f"SearchResult(gsearch, max_drop 0.01: score 0.895 of 0.9 in 200 evaluations, {wanted})"
    )
    assert shown["SearchResult under a budget"].startswith("SearchResult(gsearch, budget 0.5 keep: score 0.895")
    assert shown["Frontier"] == "Frontier(9 points, cost 0 to 0.8, 40 evaluations)"
    assert shown["Evaluator"].startswith(
        "Evaluator(LlavaForConditionalGeneration, 1 examples, 4 layers, 16 vision tokens, TextAttention("
    )
    assert shown["Handle"].startswith("Handle(LlavaForConditionalGeneration, Schedule([1.0 x2, 0.5 x2]), Text")
    example = ts.Example("1", (Image.new("RGB", (8, 8)),), "what ?", ("cat",))
    assert repr(example) == "Example('1', 1 image, 'what ?', answers=('cat',))"


def test_a_handle_says_whether_it_is_on() -> None:
    handle = ts.apply(tiny_llava(), ts.Schedule.full(4))
    assert not repr(handle).endswith("removed)")
    handle.remove()
    assert repr(handle).endswith(", removed)")


def test_results_are_keys_by_content() -> None:
    assert len({result(), result(), result(score=0.9)}) == 2
    assert hash(trial()) == hash(trial())
    assert {result(max_drop=None, budget={"unit": "keep", "limit": 0.5}, spent=0.5): 1}
    with pytest.raises(TypeError, match="not changed after it is made"):
        result(budget={"unit": "keep"}).budget["unit"] = "ms"  # type: ignore[index]
    with pytest.raises(AttributeError):
        result().trials.append(trial())  # type: ignore[attr-defined]
