"""`thinsight serve` on the embedded demo, over loopback: the answers of `generate`, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_run import SmallRun

import thinsight as ts
from thinsight.errors import BadInput
from thinsight.evaluation.prompts import PromptReader
from thinsight.job.options import EvaluateOptions, ModelOptions, ServeOptions
from thinsight.job.server import content_of, evaluate_server
from thinsight.serving import Service, metrics, open_service
from thinsight.serving.chat import read
from thinsight.serving.errors import BadRequest

for package in ("prometheus_client", "starlette", "uvicorn"):
    pytest.importorskip(package, reason="thinsight[serve] is not installed")

TOKENS = 8
MOST_WAITING = 6


@dataclass(frozen=True)
class Running:
    """A server, and what is needed to say what it has to answer."""

    url: str
    examples: list[ts.Example]
    reduction: ts.Reduction
    lines: list[str]

    def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        return answered(request)

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return answered(urllib.request.Request(self.url + path, headers=headers))

    def counted(self) -> dict[str, float]:
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def answered(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def started(service: Service) -> threading.Thread:
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    reduction = ts.Reduction(ts.Schedule.stages(12, {2: 0.0625, 8: 0.03125}), model_type="llava")
    reduction.save_pretrained(folder)
    listening, lines = threading.Event(), []

    def ready(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            listening.set()

    options = ServeOptions(
        ModelOptions(device="cpu"),
        reduction=str(folder),
        port=0,
        max_tokens=16,
        max_images=2,
        max_image_mib=1,
        max_image_pixels=250_000,
        max_waiting=MOST_WAITING,
    )
    service = open_service(options, ready=ready)
    thread = started(service)
    assert listening.wait(60)
    yield Running(service.url, ts.load_examples("demo:test", 8), reduction, lines)
    service.stop()
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def expected(server: Running) -> dict[bool, list[str]]:
    """Answers of `generate`, under the reduction (True) and without."""
    model, processor = ts.load_demo()
    found = {}
    for reduced in (True, False):
        handle = ts.apply(model, server.reduction) if reduced else None
        found[reduced] = [generated(model, processor, example) for example in server.examples]
        if handle is not None:
            handle.remove()
    assert found[True] != found[False]  # or a server that never switched would not be found out
    return found


def generated(model: Any, processor: Any, example: ts.Example) -> str:
    inputs = PromptReader(model, processor).batch([example])
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return str(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def until(holds: Callable[[], bool]) -> None:
    """Wait for what a server does when it comes to it."""
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it never came true")


def asking(example: ts.Example, model: str = "demo", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content_of(example)}]
    return {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0, **more}


def text_of(answer: tuple[int, Any]) -> str:
    status, body = answer
    assert status == 200, body
    return str(body["choices"][0]["message"]["content"])


def streamed(server: Running, body: dict[str, Any]) -> list[Any]:
    """What the events of a stream hold, but for the last one, which ends it."""
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


# -- answers -------------------------------------------------------------------------------------------------


def test_what_runs_is_said(server: Running) -> None:
    assert server.lines[0] == (
        "LlavaForConditionalGeneration with keep rates layers 2 to 7: 0.0625; layers 8 to 11: 0.03125, "
        "ranked by text-attention"
    )
    assert server.lines[1].startswith(f"{server.url}/v1 has models 'demo' (reduced) and 'demo-full' (not)")


def test_answers_are_those_of_generate_with_and_without_the_reduction(
    server: Running, expected: dict[bool, list[str]]
) -> None:
    for i, example in enumerate(server.examples):  # taking turns
        assert text_of(server.post(asking(example))) == expected[True][i]
        assert text_of(server.post(asking(example, "demo-full"))) == expected[False][i]


def test_what_clients_send_though_it_changes_nothing_is_taken(server: Running, expected: dict[bool, list[str]]) -> None:
    usual = {"n": 1, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0, "user": "me"}
    asked = {**asking(server.examples[0]), **usual, "response_format": {"type": "text"}}
    assert text_of(server.post(asked)) == expected[True][0]


def test_clients_at_once_get_their_own_answers(server: Running, expected: dict[bool, list[str]]) -> None:
    cases = [(i, reduced) for i in range(len(server.examples)) for reduced in (True, False)]

    def ask(case: tuple[int, bool]) -> str:
        return text_of(server.post(asking(server.examples[case[0]], "demo" if case[1] else "demo-full")))

    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(ask, cases))
    assert answers == [expected[reduced][i] for i, reduced in cases]


def test_a_stream_is_the_same_answer(server: Running, expected: dict[bool, list[str]]) -> None:
    *events, last, used = streamed(
        server, asking(server.examples[0], stream=True, stream_options={"include_usage": True})
    )
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(pieces) == expected[True][0]
    assert sum(map(bool, pieces)) > 1 or len(expected[True][0].split()) == 1
    whole = server.post(asking(server.examples[0]))[1]
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert (used["choices"], used["usage"]) == ([], whole["usage"])
    assert len({event["id"] for event in (*events, last, used)}) == 1


def test_an_answer_ends_where_it_is_told_to(server: Running, expected: dict[bool, list[str]]) -> None:
    i, text = max(enumerate(expected[True]), key=lambda pair: len(pair[1]))
    assert len(text.split()) > 1
    short = server.post(asking(server.examples[i], max_tokens=1))[1]
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 1
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    cut = text[: text.index(stop)]
    stopped = server.post(asking(server.examples[i], stop=stop))
    assert text_of(stopped) == cut
    assert stopped[1]["choices"][0]["finish_reason"] == "stop"
    events = streamed(server, asking(server.examples[i], stop=[stop], stream=True))
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == cut


def test_sampling_is_by_the_seed(server: Running) -> None:
    drawn = [
        text_of(server.post(asking(server.examples[0], temperature=2.0, top_p=1.0, seed=seed, max_tokens=16)))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_text_alone_and_several_turns(server: Running) -> None:
    example = server.examples[0]
    turns = [
        {"role": "user", "content": content_of(example)},
        {"role": "assistant", "content": "left"},
        {"role": "user", "content": "what is in row one column one ?"},
    ]
    assert text_of(server.post({"model": "demo", "messages": turns, "max_completion_tokens": 4, "temperature": 0}))
    before = server.counted()
    plain = {"model": "demo", "messages": [{"role": "user", "content": "how many ?"}], "max_tokens": 2}
    assert server.post(plain)[0] == 200
    after = server.counted()
    assert after["thinsight:vision_tokens_seen_total"] == before["thinsight:vision_tokens_seen_total"]


def test_it_scores_as_any_server_does(server: Running, expected: dict[bool, list[str]]) -> None:
    options = EvaluateOptions(
        server=f"{server.url}/v1", served_model="demo", data="demo:test", limit=8, max_new_tokens=TOKENS, concurrency=3
    )
    assert list(evaluate_server(options).answers) == [text.strip() for text in expected[True]]


def test_models_and_health(server: Running) -> None:
    status, listed = server.get("/v1/models")
    assert (status, [each["id"] for each in listed["data"]]) == (200, ["demo", "demo-full"])
    assert server.get("/health") == (200, {"status": "ok"})


def test_metrics_count_requests_and_tokens(server: Running) -> None:
    before = server.counted()
    server.post(asking(server.examples[0]))
    server.post(asking(server.examples[0], "demo-full"))
    server.post(asking(server.examples[0], top_k=3))
    after = server.counted()
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert grown["thinsight:vision_tokens_seen_total"] == 512
    assert grown['thinsight:vision_tokens_kept_total{layers="2-7"}'] == 16 + 256
    assert grown['thinsight:vision_tokens_kept_total{layers="8-11"}'] == 8 + 256
    assert grown["thinsight:prompts_reduced_total"] == 1
    assert grown['thinsight:prompts_whole_total{reason="the full model was asked"}'] == 1
    assert grown['thinsight:requests_total{model="demo",outcome="answered"}'] == 1
    assert grown['thinsight:requests_total{model="demo-full",outcome="answered"}'] == 1
    assert grown['thinsight:requests_total{model="",outcome="refused"}'] == 1
    assert grown['thinsight:answer_seconds_count{model="demo"}'] == 1
    assert grown['thinsight:answer_seconds_sum{model="demo"}'] > 0
    assert after["thinsight:requests_open"] == 0


def test_counters_have_the_names_of_the_plugin_for_vllm() -> None:
    from thinsight.vllm import metrics as theirs

    for name in ("SEEN", "KEPT", "REDUCED", "WHOLE"):
        assert getattr(metrics, name) == getattr(theirs, name)


# -- what is refused -----------------------------------------------------------------------------------------


def data_url(image: Image.Image, form: str = "PNG") -> str:
    written = io.BytesIO()
    image.save(written, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(written.getvalue()).decode()}"


def showing(*urls: str, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "how many ?"}]
    return {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 2, **more}


SMALL = data_url(Image.new("RGB", (8, 8), "red"))
AN_IMAGE = "messages[0].content[0].image_url.url"
REFUSED = {
    "an address": (showing("http://127.0.0.1:1/a.png"), 400, AN_IMAGE, "opens no addresses"),
    "a file": (showing("file:///etc/hostname"), 400, AN_IMAGE, "has 'file:'"),
    "a path": (showing("/etc/hostname"), 400, AN_IMAGE, "has no scheme"),
    "no base64": (showing("data:image/png;base64,%%%"), 400, AN_IMAGE, "is no base64"),
    "no image": (showing("data:image/png;base64,aGVsbG8="), 400, AN_IMAGE, "is no image"),
    "a program": (showing(data_url(Image.new("RGB", (8, 8)), "EPS")), 400, AN_IMAGE, "is no image"),
    "bytes": (showing("data:image/png;base64," + "A" * (2**20 * 4 // 3 + 8)), 413, AN_IMAGE, "1048576 bytes"),
    "pixels": (showing(data_url(Image.new("1", (600, 600)))), 400, AN_IMAGE, "600 x 600 pixels"),
    "a strip": (showing(data_url(Image.new("1", (601, 3)))), 400, AN_IMAGE, "more than 200 times"),
    "images": (showing(SMALL, SMALL, SMALL), 400, "messages", "3 images; at most 2"),
    "tokens": (showing(SMALL, max_tokens=17), 400, "max_tokens", "at most 16"),
    "no tokens": (showing(SMALL, max_tokens=0), 400, "max_tokens", "greater than or equal to 1"),
    "a model": (showing(SMALL, model="other"), 404, "model", "'demo-full'"),
    "no model": ({"messages": [{"role": "user", "content": "x"}]}, 400, "model", "is missing"),
    "no messages": ({"model": "demo", "messages": []}, 400, "messages", "at least 1 item"),
    "a video": (
        {"model": "demo", "messages": [{"role": "user", "content": [{"type": "video_url"}]}]},
        400,
        "messages[0].content[0].type",
        "text, image_url",
    ),
    "several": (showing(SMALL, n=2), 400, "n", "Input should be 1"),
    "a format": (
        showing(SMALL, response_format={"type": "json_object"}),
        400,
        "response_format.type",
        "Input should be 'text'",
    ),
    "tools": (showing(SMALL, tools=[]), 400, "tools", "is not known"),
    "a word": (showing(SMALL, temperature="hot"), 400, "temperature", "'hot'"),
    "infinity": (showing(SMALL, temperature=float("inf")), 400, "temperature", "finite"),
    "no JSON": (b"{", 400, None, "no JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(server: Running, case: str) -> None:
    body, status, field, message = REFUSED[case]
    found, said = server.post(body)
    assert (found, said["error"]["param"]) == (status, field), said
    assert message in said["error"]["message"]
    assert said["error"]["type"] == "invalid_request_error"
    assert "Traceback" not in json.dumps(said)


def test_a_body_that_is_too_large_is_not_read(server: Running) -> None:
    status, said = server.post(b" " * (2 * 2**20 * 4 // 3 + 2**20 + 1))
    assert (status, "bytes" in said["error"]["message"]) == (413, True)


def test_pages_in_a_browser_cannot_ask(server: Running) -> None:
    body = json.dumps(showing(SMALL)).encode()
    assert server.post(body, **{"Content-Type": "text/plain"})[0] == 415
    assert server.post(body, Host="evil.example.com")[0] == 403
    assert server.get("/metrics", Host="evil.example.com")[0] == 403


def test_other_paths_and_methods_are_errors_in_json(server: Running) -> None:
    assert server.get("/v1/nothing")[0] == 404
    status, said = server.get("/v1/chat/completions")
    assert (status, said["error"]["type"]) == (405, "invalid_request_error")


def test_a_long_prompt_is_refused(server: Running) -> None:
    status, said = server.post(
        {"model": "demo", "messages": [{"role": "user", "content": "how many ? " * 1000}], "max_tokens": 2}
    )
    assert (status, said["error"]["code"]) == (400, "context_length_exceeded")


def test_the_answer_is_as_long_as_there_is_room_for(server: Running) -> None:
    words = {"role": "user", "content": "how many ? " * 677}  # with the answer's 16 tokens more than the model takes
    status, said = server.post({"model": "demo", "messages": [words], "temperature": 0})
    assert status == 200, said
    assert 2032 < said["usage"]["prompt_tokens"] < 2048
    assert server.post({"model": "demo", "messages": [words], "temperature": 0, "max_tokens": 16})[0] == 400


def test_a_failure_is_one_request_alone(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("secret of the machine")

    with monkeypatch.context() as patched:
        patched.setattr("thinsight.serving.engine.vision_token_mask", fails)
        status, said = server.post(asking(server.examples[0]))
    assert (status, said["error"]["type"]) == (500, "server_error")
    assert "secret" not in json.dumps(said)
    assert server.post(asking(server.examples[0]))[0] == 200


def test_who_hangs_up_is_not_answered(server: Running) -> None:
    before = server.counted()
    body = json.dumps(asking(server.examples[0], max_tokens=16, temperature=2.0, seed=3)).encode()
    host, port = server.url.removeprefix("http://").split(":")
    lines = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    held = [socket.create_connection((host, int(port))) for _ in range(MOST_WAITING - 1)]
    for each in held:
        each.sendall(f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    for each in held:
        each.close()
    assert text_of(server.post(asking(server.examples[0])))  # after them, and soon
    until(lambda: server.counted()["thinsight:requests_open"] == 0)
    after = server.counted()
    cancelled = [name for name in after if name.endswith('outcome="cancelled"}')]
    assert sum(after[name] for name in cancelled) > sum(before.get(name, 0) for name in cancelled)


def test_more_than_may_wait_are_told_to_come_back(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    begun = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    held = [socket.create_connection((host, int(port))) for _ in range(MOST_WAITING)]
    for each in held:
        each.sendall(f"{begun}Content-Length: 10\r\n\r\n".encode())  # and the rest never comes
    until(lambda: server.counted()["thinsight:requests_open"] == MOST_WAITING)
    assert server.post(showing(SMALL))[0] == 503
    for each in held:
        each.close()
    until(lambda: server.counted()["thinsight:requests_open"] == 0)
    assert server.post(showing(SMALL))[0] == 200


# -- other servers -------------------------------------------------------------------------------------------


class _Images(BaseHTTPRequestHandler):
    """An image at /image, a redirect at anything else."""

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        data = base64.b64decode(SMALL.partition(",")[2]) if self.path == "/image" else b""
        self.send_response(200 if data else 302)
        if not data:
            self.send_header("Location", {"/file": "file:///etc/hostname"}.get(self.path, "http://localhost:1/x"))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def images() -> Iterator[str]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), _Images)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{found.server_address[1]}"
    found.shutdown()
    found.server_close()
    thread.join()


def fetched(url: str, **more: Any) -> Image.Image:
    from thinsight.serving.chat import Address
    from thinsight.serving.images import ImageRules, load_images

    return load_images((Address(url, AN_IMAGE),), replace(ImageRules(2**20, 2**20, True), **more))[0]


def test_addresses_are_opened_on_hosts_that_were_allowed(images: str) -> None:
    assert fetched(f"{images}/image", hosts=("127.0.0.1",)).size == (8, 8)
    with pytest.raises(BadRequest, match="not among those that were allowed"):
        fetched(f"{images}/image", hosts=("images.example.com",))
    with pytest.raises(BadRequest, match="more than 20 bytes"):
        fetched(f"{images}/image", hosts=("127.0.0.1",), most_bytes=20)


@pytest.mark.parametrize(
    ("path", "message"), [("file", "answers 302"), ("elsewhere", "leads on to an address that is not opened here")]
)
def test_redirects_stay_where_they_may_be(images: str, path: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        fetched(f"{images}/{path}", hosts=("127.0.0.1",))


def test_private_networks_are_not_public(images: str) -> None:
    with pytest.raises(BadRequest, match="leads into a private network"):
        fetched(f"{images}/image")


def test_a_key_is_asked_for(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINSIGHT_API_KEY", "secret")
    ts.Reduction(ts.Schedule.full(4)).save_pretrained(small.folder / "full")
    listening = threading.Event()
    model = ModelOptions(small.model, device="cpu")
    service = open_service(
        ServeOptions(model, str(small.folder / "full"), name="tiny", port=0), ready=lambda _: listening.set()
    )
    thread = started(service)
    assert listening.wait(60)
    asked = Running(service.url, [], ts.Reduction(ts.Schedule.full(4)), [])
    body = {"model": "tiny", "messages": [{"role": "user", "content": "how many ?"}], "max_tokens": 1}
    assert asked.get("/v1/models")[0] == 401
    assert asked.post(body, Authorization="Bearer wrong")[0] == 401
    assert asked.post(body, Authorization="Bearer secret")[0] == 200  # a processor without a chat template
    two = {**body, "messages": [*body["messages"], {"role": "user", "content": "what ?"}]}
    status, said = asked.post(two, Authorization="Bearer secret")
    assert (status, "no chat template" in said["error"]["message"]) == (400, True)
    assert asked.get("/health")[0] == 200
    service.stop()
    thread.join(60)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"host": "example.com"}, "host is 'example.com'"),
        ({"port": 70_000}, "port is 70000"),
        ({"max_waiting": 0}, "max_waiting is 0"),
        ({"host": "192.0.2.1"}, "cannot be listened on"),
        ({"reduction": "nowhere"}, "nowhere"),
    ],
)
def test_options_that_cannot_be_right(more: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinsight.job.opening.load_model", None)
    with pytest.raises(BadInput, match=message):
        open_service(ServeOptions(**{"port": 0, **more}))


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinsight.job.opening.load_model", None)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(BadInput, match="give another --port"):
        open_service(ServeOptions(port=taken.getsockname()[1]))


def test_a_field_deep_inside_has_its_place() -> None:
    with pytest.raises(BadRequest) as caught:
        read(b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "text"}]}]}', "m", 1, 1)
    assert caught.value.field == "messages[0].content[0].text"


def test_the_command_ends_on_a_signal(small: SmallRun, tmp_path: Path) -> None:
    ts.Reduction(ts.Schedule.full(4)).save_pretrained(tmp_path / "full")
    words = ["--model", small.model, "--reduction", str(tmp_path / "full"), "--port", "0", "--device", "cpu"]
    command = [sys.executable, "-m", "thinsight", "serve", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        rest, told = process.communicate(timeout=60)
    assert lines[0] == "LlavaForConditionalGeneration with every vision token\n"
    assert "/v1 has models 'model' (reduced)" in lines[1]
    assert (process.returncode, rest) == (143, "")
    assert told.splitlines()[-1] == "ended by SIGTERM"
