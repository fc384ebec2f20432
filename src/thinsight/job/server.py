"""A running server, scored as a model is: the same data, metrics and intervals, whatever engine answers.

Speaks the OpenAI chat API and nothing else of a server. If a file is named, every answer is kept there as it comes, so
that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import shown
from ..errors import BadInput, StorageError, whole
from ..evaluation.examples import Example, load_examples
from ..evaluation.metrics import metric_for
from ..evaluation.result import Evaluation, Interval, drop_interval
from ..progress import Watcher
from ..records import user_path
from ..texts import counted
from .opening import content_hash
from .options import EvaluateOptions

PLACE = re.compile(r"<image(?:[ _]?(\d+))?>")  # as `Example.question` has it
LONGEST = 64  # tokens of an answer unless an option says otherwise
TRIES = 6
FIRST_WAIT, LAST_WAIT = 0.5, 30.0  # seconds before an answer is asked for again, doubled each time
TIMEOUT = 600.0  # seconds for one answer
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
_KEYS = ("OPENAI_API_KEY", "VLLM_API_KEY")


@dataclass(frozen=True)
class ServerResult(shown.Shown):
    """What servers scored. ``drop`` is the other's score minus this one's; None where there is no other."""

    server: str
    model: str
    dataset: str
    evaluation: Evaluation
    interval: Interval
    against: str = ""
    full: Evaluation | None = None
    drop: Interval | None = None
    answers: tuple[str, ...] = field(default=(), repr=False)
    same: float | None = None  # of the answers, the share that is the other's to the letter

    def _tables(self) -> Iterable[shown.Table]:
        drop = self.drop
        known = {
            "server": f"{self.server}, model {self.model}",
            "data": self.dataset,
            "score": f"{_points(self.evaluation.score)}, 95 % interval {_span(self.interval)}",
            "against": self.against,
            "its score": "" if self.full is None else _points(self.full.score),
            "drop": "" if drop is None else f"{_points(drop.mean)}, 95 % interval {_span(drop)}",
            "same answers": "" if self.same is None else shown.percent(self.same),
        }
        return [shown.facts_table("Server", known.items())]


def _points(value: float) -> str:
    return f"{shown.points(value)} %"


def _span(interval: Interval) -> str:
    return f"{shown.points(interval.low)} to {shown.points(interval.high)}"


def evaluate_server(options: EvaluateOptions, watcher: Watcher | None = None) -> ServerResult:
    """Score a server's answers, and those of another one to compare it with.

    The score's interval is that of a drop to a server that gets nothing right. Where an example has no answers, the
    other server's answer is the right one.

    Raises:
        BadInput: an option, an address, a model that the server does not have, or what it refuses to answer.
        StorageError: it does not answer, or is too busy for `TRIES` tries; answers cannot be kept.
    """
    watcher = watcher or Watcher()
    check_server_options(options)
    watcher.on_stage("Reading the data")
    examples = load_examples(options.data_name, options.limit, progress=watcher.on_progress, **options.reading)
    metrics = [metric_for(each.answers, options.metric or each.metric, f"example {each.id!r}") for each in examples]
    unlabelled = [each.id for each, metric in zip(examples, metrics, strict=True) if not metric.needs_answers]
    if unlabelled and options.against is None:
        raise BadInput(
            f"example {unlabelled[0]!r} is scored by agreement with another server's answer: name that one with "
            "--against, or give answers"
        )
    most = options.max_new_tokens or LONGEST
    kept = Kept(options.answers, content_hash(examples), most)
    assert options.server is not None
    asked = [Server(options.server, options.served_model)]
    if options.against is not None:
        asked.append(Server(options.against, options.against_model or options.served_model))
    for server in asked:
        server.choose_model()
    found = [server.answers(examples, most, options.concurrency, kept, watcher) for server in asked]
    groups = [each.group for each in examples]
    right = [
        [answer] if not metric.needs_answers else each.answers
        for each, metric, answer in zip(examples, metrics, found[-1], strict=True)
    ]
    scores = [
        np.array([m(a, r, e.question) for m, a, r, e in zip(metrics, answers, right, examples, strict=True)])
        for answers in found
    ]
    evaluations = [Evaluation(float(each.mean()), each) for each in scores]
    other = len(asked) > 1
    same = [a == b for a, b in zip(found[0], found[-1], strict=True)]
    return ServerResult(
        server=asked[0].url,
        model=asked[0].model,
        dataset=f"{options.data_name}, {counted(len(examples), 'example')}",
        evaluation=evaluations[0],
        interval=drop_interval(scores[0], np.zeros(len(examples)), groups=groups),
        against=f"{asked[1].url}, model {asked[1].model}" if other else "",
        full=evaluations[1] if other else None,
        drop=drop_interval(scores[1], scores[0], groups=groups) if other else None,
        answers=tuple(found[0]),
        same=float(np.mean(same)) if other else None,
    )


def check_server_options(options: EvaluateOptions) -> None:
    """Refuse what cannot be right before anything is read."""
    whole(options.concurrency, "concurrency")
    if options.max_new_tokens is not None:
        whole(options.max_new_tokens, "max_new_tokens")
    if options.reduction is not None:
        raise BadInput("reduction is of a model that runs here; what a server runs is said when it is started")
    if options.against_model is not None and options.against is None:
        raise BadInput(f"against_model is {options.against_model!r} without --against: name its server, too")
    for name, url in (("server", options.server), ("against", options.against)):
        if url is None:
            continue
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"{name} is {url!r}; give the address of the API, such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise BadInput(f"{name} holds a password; set OPENAI_API_KEY instead")


# -- a server ------------------------------------------------------------------------------------------------


class Server:
    """An OpenAI-compatible server."""

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.model = model or ""
        self._key = next((os.environ[name] for name in _KEYS if os.environ.get(name)), None)

    def choose_model(self) -> None:
        """The model that is asked: the one named, or the only one."""
        listed = self._call("/models", None)
        entries = listed.get("data") if isinstance(listed, dict) else None
        names = [str(each.get("id")) for each in entries or () if isinstance(each, dict)]
        if self.model and self.model not in names:
            raise BadInput(f"{self.url} has no model {self.model!r}; it has {', '.join(names) or 'none'}")
        if not self.model and len(names) != 1:
            raise BadInput(f"{self.url} has {len(names)} models ({', '.join(names)}): name one with --served-model")
        self.model = self.model or names[0]

    def answers(
        self, examples: Sequence[Example], most: int, concurrency: int, kept: Kept, watcher: Watcher
    ) -> list[str]:
        """Its answers, in the examples' order; those that were kept are not asked for again."""
        watcher.on_stage(f"Asking {self.url}")
        known = kept.of(self)
        missing = [each for each in examples if each.id not in known]
        if len(missing) < len(examples):
            watcher.on_note(f"Kept from before: {counted(len(examples) - len(missing), 'answer')}")
        done, waiting = len(examples) - len(missing), iter(missing)
        with ThreadPoolExecutor(concurrency) as threads:
            running: dict[Future[str], Example] = {}
            stop = threading.Event()
            try:
                while True:
                    # no more than are asked for at once: images are encoded as their turn comes
                    while len(running) < concurrency and (example := next(waiting, None)) is not None:
                        running[threads.submit(self._answer, example, most, stop)] = example
                    if not running:
                        break
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for each in finished:
                        example = running.pop(each)
                        known[example.id] = each.result()
                        kept.add(self, example.id, known[example.id])
                        done += 1
                        watcher.on_progress("answers", done, len(examples))
            finally:
                stop.set()
        return [known[each.id] for each in examples]

    def _answer(self, example: Example, most: int, stop: threading.Event) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content_of(example)}],
            "max_tokens": most,
            "temperature": 0,
        }
        found = self._call("/chat/completions", body, f"example {example.id!r}", stop)
        try:
            text = found["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise BadInput(f"{self.url} gave no answer to example {example.id!r}: {str(found)[:200]}") from None
        return text.strip() if isinstance(text, str) else ""

    def _call(self, path: str, body: dict[str, Any] | None, what: str = "", stop: threading.Event | None = None) -> Any:
        """One request, again where the server is busy."""
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers)
        delay, about = FIRST_WAIT, f" {what}" if what else ""
        for attempt in range(1, TRIES + 1):
            asked: float | None = None
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                said = _message(error)
                if error.code not in _BUSY:
                    raise BadInput(f"{self.url} refuses{about} ({error.code}): {said}") from None
                why, asked = f"{error.code}: {said}", _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
                why = str(getattr(error, "reason", None) or error) or type(error).__name__
            except ValueError as error:
                raise BadInput(
                    f"{self.url}{path} does not answer in JSON ({error}): is it the API's address?"
                ) from None
            if attempt == TRIES or (stop is not None and stop.is_set()):
                break
            # not all at once again
            pause = min(LAST_WAIT, delay if asked is None else asked) * random.uniform(1, 1.25)
            if stop is None:
                time.sleep(pause)
            elif stop.wait(pause):
                break
            delay *= 2
        raise StorageError(f"{self.url} does not answer{about} ({why}); see that it runs, or ask less at once")


def content_of(example: Example) -> list[dict[str, Any]]:
    """A question as the parts of a chat message: texts and images, as `Example.question` places them.

    Raises:
        BadInput: it places other images than it has.
    """
    images = [{"type": "image_url", "image_url": {"url": data_url(each)}} for each in example.open_images()]
    found = list(PLACE.finditer(example.question))
    if not found:
        return [*images, _text(example.question)]
    numbers = [i if match[1] is None else int(match[1]) - 1 for i, match in enumerate(found)]
    if sorted(numbers) != list(range(len(images))):
        raise BadInput(f"example {example.id!r} has {len(images)} images but places {len(found)}: place each once")
    parts, end = [], 0
    for match, number in zip(found, numbers, strict=True):
        parts += [_text(example.question[end : match.start()]), images[number]]
        end = match.end()
    parts.append(_text(example.question[end:]))
    return [part for part in parts if part["type"] != "text" or part["text"].strip()]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text.strip("\n")}


def data_url(image: Any) -> str:
    """An image as a PNG in an address: what the server sees is the pixels that a model here would see."""
    written = io.BytesIO()
    image.save(written, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


def _message(error: urllib.error.HTTPError) -> str:
    """What a server says of an error, in a line."""
    try:
        text = error.read(20_000).decode(errors="replace")
    except OSError:
        return str(error.reason)
    try:
        found = json.loads(text)
        found = found.get("error", found)
        return str(found.get("message", found) if isinstance(found, dict) else found)[:400]
    except (ValueError, AttributeError):
        return text[:400] or str(error.reason)


def _seconds(text: str | None) -> float | None:
    """What Retry-After asks for; None where it is a date, or not there."""
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:
        return None


# -- answers that are kept -----------------------------------------------------------------------------------


class Kept:
    """Answers in a JSON-lines file, those of several servers and data sets beside each other; in memory without one."""

    def __init__(self, path: Path | None, data: str, most: int) -> None:
        self.path = None if path is None else user_path(path, "answers")
        self._about = {"data": data, "max_new_tokens": most}
        self._lines: list[dict[str, Any]] = []
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            with self.path.open("a", encoding="utf-8") as file:
                if text and not text.endswith("\n"):  # cut off in the middle of a line
                    file.write("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"answers {self.path} cannot be read and written ({error}): give another file") from None
        for line in text.splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue  # the line at which a run was killed: it is asked for again
            if isinstance(found, dict) and isinstance(found.get("answer"), str):
                self._lines.append(found)

    def of(self, server: Server) -> dict[str, str]:
        """A server's answers to this data, by the example's id."""
        key = self._key(server)
        return {str(each["id"]): each["answer"] for each in self._lines if each.get("key") == key}

    def add(self, server: Server, name: str, answer: str) -> None:
        if self.path is None:
            return
        line = json.dumps({"key": self._key(server), "server": server.url, "id": name, "answer": answer})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise StorageError(f"answers {self.path} cannot be written ({error.strerror}): free the disk") from None

    def _key(self, server: Server) -> str:
        about = {**self._about, "server": server.url, "model": server.model}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
