"""A running server scored: what it is asked, concurrency, retries, resuming; against a stand-in on loopback."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_images
from typer.testing import CliRunner

from thinsight import drop_interval
from thinsight.cli import app
from thinsight.errors import BadInput, StorageError
from thinsight.evaluation.examples import Example
from thinsight.job import server as module
from thinsight.job.options import EvaluateOptions
from thinsight.job.server import content_of, evaluate_server
from thinsight.progress import Watcher

COUNT = 12


class StandIn(ThreadingHTTPServer):
    """Answers what `say` makes of a question's text; `fails` says with what status it answers first."""

    daemon_threads = True

    def __init__(self, say: Callable[[str], str], fails: Callable[[str, int], int] = lambda *_: 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.say, self.fails = say, fails
        self.models = ["the-model"]
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.lock, self.running, self.most = threading.Lock(), 0, 0
        self.together: threading.Barrier | None = None
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = " ".join(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")
        with self.server.lock:
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
            self.server.asked[text] += 1
            self.server.bodies.append(body)
            times = self.server.asked[text]
        try:
            if self.server.together is not None:
                self.server.together.wait(30)
            status = self.server.fails(text, times)
            if status == 0:  # hangs up
                self.connection.close()
                return
            said = {"choices": [{"message": {"content": self.server.say(text)}}]}
            self._send(status, said if status == 200 else {"error": {"message": "not now"}})
        finally:
            with self.server.lock:
                self.server.running -= 1

    def _send(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandIn]]:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    for name in ("OPENAI_API_KEY", "VLLM_API_KEY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    started: list[StandIn] = []

    def make(*args: Any) -> StandIn:
        started.append(StandIn(*args))
        return started[-1]

    yield make
    for each in started:
        each.stop()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve questions about six images; the right answer is the question's number."""
    for number, image in enumerate(tiny_images(COUNT // 2)):
        image.save(tmp_path / f"{number}.png")
    lines = [
        {"id": str(n), "image": f"{n // 2}.png", "question": f"number {n}", "answers": [str(n)]} for n in range(COUNT)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def right(text: str) -> str:
    return f" {text.split()[-1]}. "


def half(text: str) -> str:
    return right(text) if int(text.split()[-1]) % 2 else "no"


def options(data: Path, server: StandIn, **more: Any) -> EvaluateOptions:
    return EvaluateOptions(server=server.url, data=str(data), **more)


def test_score_drop_and_intervals(start: Any, data: Path) -> None:
    reduced, full = start(half), start(right)
    result = evaluate_server(options(data, reduced, against=full.url))
    scores = np.array([n % 2 for n in range(COUNT)], dtype=float)
    groups = [n // 2 for n in range(COUNT)]
    assert result.evaluation.score == 0.5
    assert result.evaluation.per_example is not None
    assert result.evaluation.per_example.tolist() == scores.tolist()
    assert result.full is not None
    assert result.full.score == 1.0
    assert result.drop == drop_interval(np.ones(COUNT), scores, groups=groups)
    assert result.interval == drop_interval(scores, np.zeros(COUNT), groups=groups)
    assert result.same == 0.5
    assert result.answers == tuple(half(f"number {n}").strip() for n in range(COUNT))


def test_without_labels_the_other_server_is_right(start: Any, data: Path) -> None:
    reduced, full = start(half), start(right)
    assert evaluate_server(options(data, reduced, against=full.url, metric="agreement")).evaluation.score == 0.5
    with pytest.raises(BadInput, match="--against"):
        evaluate_server(options(data, reduced, metric="agreement"))


def test_what_a_server_is_asked(start: Any, data: Path) -> None:
    server = start(right)
    evaluate_server(options(data, server, limit=1, max_new_tokens=7))
    (body,) = server.bodies
    assert {key: body[key] for key in ("model", "max_tokens", "temperature")} == {
        "model": "the-model",
        "max_tokens": 7,
        "temperature": 0,
    }
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "number 0"}
    pixels = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
    assert np.array_equal(np.asarray(pixels), np.asarray(Image.open(data.parent / "0.png").convert("RGB")))


def test_images_stand_where_the_question_has_them() -> None:
    images = tuple(tiny_images(2))

    def kinds(question: str) -> list[str]:
        parts = content_of(Example("1", images, question))
        urls = [part["image_url"]["url"] for part in content_of(Example("1", images, "x")) if part["type"] != "text"]
        return [
            part["text"] if part["type"] == "text" else f"image {urls.index(part['image_url']['url'])}"
            for part in parts
        ]

    assert kinds("same?") == ["image 0", "image 1", "same?"]
    assert kinds("a <image> b <image>") == ["a ", "image 0", " b ", "image 1"]
    assert kinds("<image 2> and <image 1>?") == ["image 1", " and ", "image 0", "?"]
    with pytest.raises(BadInput, match="2 images but places 1"):
        content_of(Example("1", images, "one <image>"))


def test_so_many_are_asked_at_once(start: Any, data: Path) -> None:
    server = start(right)
    server.together = threading.Barrier(4)  # nobody is answered before four have asked
    evaluate_server(options(data, server, concurrency=4))
    assert server.most == 4


@pytest.mark.parametrize("status", [429, 503, 0])
def test_a_busy_server_is_asked_again(start: Any, data: Path, status: int) -> None:
    server = start(right, lambda text, times: status if times < 3 else 200)
    assert evaluate_server(options(data, server)).evaluation.score == 1.0
    assert set(server.asked.values()) == {3}


def test_a_server_that_stays_busy_is_given_up(start: Any, data: Path) -> None:
    server = start(right, lambda *_: 503)
    with pytest.raises(StorageError, match=r"does not answer example '\d+' \(503: not now\)"):
        evaluate_server(options(data, server, concurrency=1))
    assert server.asked["number 0"] == module.TRIES


def test_what_it_refuses_is_not_asked_again(start: Any, data: Path) -> None:
    server = start(right, lambda *_: 400)
    with pytest.raises(BadInput, match=r"refuses example '0' \(400\): not now"):
        evaluate_server(options(data, server, concurrency=1))
    assert server.asked == {"number 0": 1}


def test_an_interrupted_run_goes_on(start: Any, data: Path, tmp_path: Path) -> None:
    kept = tmp_path / "sub" / "answers.jsonl"
    server = start(right, lambda text, times: 400 if text == "number 7" and times == 1 else 200)
    with pytest.raises(BadInput):
        evaluate_server(options(data, server, concurrency=1, answers=kept))
    assert len(kept.read_text().splitlines()) == 7
    with kept.open("a") as file:
        file.write('{"key": "cut off')  # killed in the middle of a line
    told: list[tuple[int, int]] = []

    class Noting(Watcher):
        def on_progress(self, what: str, done: int, total: int) -> None:
            if what == "answers":
                told.append((done, total))

    result = evaluate_server(options(data, server, concurrency=1, answers=kept), Noting())
    assert result.evaluation.score == 1.0
    assert told == [(done, COUNT) for done in range(8, COUNT + 1)]
    assert [server.asked[f"number {n}"] for n in range(COUNT)] == [1] * 7 + [2] + [1] * 4
    evaluate_server(options(data, server, answers=kept))
    assert server.asked.total() == COUNT + 1  # nothing was asked a third time
    evaluate_server(options(data, server, answers=kept, max_new_tokens=5))
    assert server.asked.total() == 2 * COUNT + 1  # another question


def test_models(start: Any, data: Path) -> None:
    server = start(right)
    server.models = ["a", "b"]
    with pytest.raises(BadInput, match=r"has 2 models \(a, b\): name one"):
        evaluate_server(options(data, server))
    with pytest.raises(BadInput, match="has no model 'c'"):
        evaluate_server(options(data, server, served_model="c"))
    assert evaluate_server(options(data, server, served_model="b")).model == "b"


def test_options_that_cannot_be_right(start: Any, data: Path) -> None:
    for url in ("127.0.0.1:8000", "file:///etc", "http://"):
        with pytest.raises(BadInput, match="give the address"):
            evaluate_server(EvaluateOptions(server=url, data=str(data)))
    with pytest.raises(BadInput, match="holds a password"):
        evaluate_server(EvaluateOptions(server="http://me:it@127.0.0.1/v1", data=str(data)))
    with pytest.raises(BadInput, match="concurrency is 0"):
        evaluate_server(options(data, start(right), concurrency=0))
    with pytest.raises(BadInput, match="reduction is of a model"):
        evaluate_server(options(data, start(right), reduction="x"))
    with pytest.raises(BadInput, match="answers is of a server"):
        EvaluateOptions(answers=data).check()


def test_the_command(start: Any, data: Path) -> None:
    reduced, full = start(half), start(right)
    command = ["evaluate", "--server", reduced.url, "--against", full.url, "--data", str(data)]
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, command)
    assert result.exit_code == 0, result.output
    for text in ("50.0 %", "100.0 %", "the-model", "12 examples", "drop"):
        assert text in result.stdout
