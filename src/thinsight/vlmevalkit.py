"""VLMEvalKit under a reduction. That harness finds models in a table of its own only, so this runs it with one more:

    python -m thinsight.vlmevalkit --model llava-hf/llava-1.5-7b-hf --reduction my-reduction --data MMBench_DEV_EN

``--model`` is a folder or a Hub id, asked by its processor's chat template, or one of the harness's own names, asked as
its class asks. All other options are the harness's. Without a reduction the model runs full.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .errors import BadInput, MissingPackage
from .evaluation.images import open_image
from .harness import RunFailed, Watch, check_told, loud, put_on
from .loading import load_model
from .reduction import Reduction, public_name


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the harness with the model that the command line names.

    Raises:
        RunFailed: the model or the reduction cannot be used, a question failed, or none reached the model: the harness
            alone would log that, skip the data set and end well.
    """
    told, rest = _parser().parse_known_args(arguments)
    reduction = {name: getattr(told, name) for name in ("reduction", "keep", "layer", "ranker")}
    reduces = any(value is not None for value in reduction.values())
    with loud("options"):
        if reduces:
            check_told(**reduction)
        name = _name(told.model, reduction)
        run, models = _harness()
    made: list[Watch] = []
    models[name] = partial(_build, models.get(told.model), told, reduction if reduces else None, made)
    sys.argv = ["vlmeval", "--model", name, "--work-dir", told.work_dir, *rest]
    run.main()
    _check_done(name, told.work_dir, made)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m thinsight.vlmevalkit",
        description="VLMEvalKit with a model under a reduction. Options that are not listed are VLMEvalKit's.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="demo, a folder, a hub id, or a name of VLMEvalKit's")
    parser.add_argument("--reduction", help="folder or hub id of a reduction")
    parser.add_argument("--keep", type=float, help="instead: the share of vision tokens that stay")
    parser.add_argument("--layer", type=int, help="of --keep: the first layer that sees fewer (2)")
    parser.add_argument("--ranker", help="of --keep: name or name:key=value (text-attention)")
    parser.add_argument("--dtype", default="auto", help="of a folder or hub id: float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="of a folder or hub id: cpu, cuda, cuda:N")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of a folder or hub id: longest answer (512)")
    parser.add_argument("--work-dir", default="./outputs", help="where VLMEvalKit writes")
    return parser


def _harness() -> tuple[Any, dict[str, Any]]:
    try:
        import vlmeval.run
        from vlmeval.config import supported_VLM
    except ImportError as error:
        raise MissingPackage(
            f"VLMEvalKit cannot be imported ({error}): pip install ms-vlmeval, see docs/harnesses.md"
        ) from error
    return vlmeval.run, supported_VLM


def _name(model: str, reduction: dict[str, Any]) -> str:
    """What the harness calls it, and its folder: full and reduced runs must not take each other's answers."""
    if reduction["reduction"] is not None:
        content = json.dumps(Reduction.from_pretrained(reduction["reduction"]).to_dict(), sort_keys=True)
        put = f"{public_name(reduction['reduction'])}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    else:
        put = "-".join(f"{name}{value}" for name, value in reduction.items() if value is not None) or "full"
    return re.sub(r"[^\w.=-]+", "--", f"{public_name(os.path.expanduser(model))}-{put}")


def _build(
    own: Callable[..., Any] | None, told: Any, reduction: dict[str, Any] | None, made: list[Watch], **options: Any
) -> Any:
    """The harness's model object; ``own`` makes its own one, if it has one of that name."""
    with loud(f"model {told.model!r}"):
        if own is None and options.get("use_vllm"):
            raise BadInput("use-vllm is VLMEvalKit's way for its own models: leave it out, or see docs/serving.md")
        wrapped = own(**options) if own is not None else _chatting(told)
        if not hasattr(wrapped, "model"):
            raise BadInput(f"VLMEvalKit's {type(wrapped).__name__} has no transformers model: name a folder or hub id")
        if reduction is not None:
            put_on(wrapped.model, **reduction)
        made.append(Watch(wrapped.model))
    return wrapped


def _chatting(told: Any) -> Any:
    """Any checkpoint as a model of the harness: one turn by the processor's chat template, answered greedily."""
    from vlmeval.vlm.base import BaseModel

    model, processor = load_model(told.model, told.dtype, told.device)

    class Chatting(BaseModel):
        INTERLEAVE = True

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            with loud(f"a question of {dataset} cannot be asked"):
                parts = [_part(each) for each in message]
                inputs = processor.apply_chat_template(
                    [{"role": "user", "content": parts}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                ).to(model.device, dtype=model.dtype)
            found = model.generate(**inputs, max_new_tokens=told.max_new_tokens, do_sample=False)
            answer = found[:, inputs["input_ids"].shape[1] :]
            return str(processor.batch_decode(answer, skip_special_tokens=True)[0]).strip()

    return Chatting()


def _part(part: dict[str, str]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["value"]}
    if part["type"] == "image":
        return {"type": "image", "image": open_image(Path(part["value"]), "the message")}
    raise BadInput(f"the message has a part of type {part['type']!r}: only text and images can be asked here")


def _check_done(name: str, work_dir: str, made: list[Watch]) -> None:
    """The harness skips a data set that fails, and ends well."""
    from vlmeval.smp import load_run_status

    status = load_run_status(Path(os.environ.get("MMEVAL_ROOT", work_dir)) / name).get("datasets", {})
    for dataset, found in status.items():
        why = found.get("error_message")  # "" where an error has no text
        if why is None and found.get("skip_reason") == "invalid_dataset":
            why = "there is no such data"
        if why is not None:
            raise RunFailed(f"thinsight: data {dataset!r} failed: {why or 'an error'}; see VLMEvalKit's log above")
    if any(each.answered == 0 for each in made):
        raise RunFailed("thinsight: no question reached generate() of the model: see VLMEvalKit's log above")


if __name__ == "__main__":
    main()
