"""vLLM's OpenAI server on loopback, as users run it: the plugin found by its entry point, the engine in its own
process; concurrent clients, streams, aborts, /metrics, and `thinsight evaluate --server`."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cases import PROMPTS, STAIRS, Prompt
from checkpoints import CHECKPOINTS
from engine import ROOT, WORDS, option, references

CHECKPOINT = CHECKPOINTS["llava"]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(ROOT / "llava")),
        *("--host", "127.0.0.1", "--port", str(number), "--served-model-name", "reduced"),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"),
        *("--max-num-batched-tokens", "1024", "--no-enable-chunked-prefill"),
        *("--limit-mm-per-prompt", '{"image": 3}', "--additional-config", json.dumps(option(STAIRS))),
        *("--chat-template", "{{ messages[0]['content'] }}", "--chat-template-content-format", "string"),
    ]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                call(number, "GET", "/health")
                break
            except OSError:
                time.sleep(0.5)
        assert "thinsight: LlavaForConditionalGeneration with keep rates layers 1-2: 0.6" in log.read_text()
        yield number
    finally:
        server.terminate()
        server.wait(60)


def call(port: int, method: str, path: str, body: Any = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    assert response.status == 200, text[:500]
    connection.close()
    return text


def body_of(prompt: Prompt, **more: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": CHECKPOINT.text(prompt)}]
    for image in CHECKPOINT.images(prompt):
        written = io.BytesIO()
        image.save(written, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {
        "model": "reduced",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": prompt.answer,
        "temperature": 0,
        "ignore_eos": True,
        "add_special_tokens": False,
        "allowed_token_ids": WORDS,
        "logprobs": True,
        **more,
    }


def ids_of(tokens: list[dict[str, Any]]) -> list[int]:
    return [int(each["token"].strip().removeprefix("w")) for each in tokens]


def ask(port: int, prompt: Prompt) -> list[int]:
    found = json.loads(call(port, "POST", "/v1/chat/completions", body_of(prompt)))
    return ids_of(found["choices"][0]["logprobs"]["content"])


def stream(port: int, prompt: Prompt, most: int | None = None) -> list[int]:
    """A streamed answer; with `most`, hung up on after so many tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body_of(prompt, stream=True)), {"Content-Type": "application/json"}
    )
    ids: list[int] = []
    for line in connection.getresponse():
        said = line.decode().strip().removeprefix("data: ")
        if said.startswith("{"):
            choices = json.loads(said)["choices"]
            ids += ids_of((choices[0].get("logprobs") or {}).get("content") or []) if choices else []
        if most is not None and len(ids) >= most:
            break
    connection.close()
    return ids


def counters(port: int) -> dict[str, float]:
    text = call(port, "GET", "/metrics").decode()
    return {name: float(value) for name, value in re.findall(r"^(thinsight:.+) (\S+)$", text, re.MULTILINE)}


def test_concurrent_clients_streams_and_aborts(port: int) -> None:
    wanted = [each["ids"] for each in references()["llava"]["stairs"]]
    before = counters(port)
    with ThreadPoolExecutor(8) as clients:
        plain = [clients.submit(ask, port, prompt) for prompt in PROMPTS]
        aborted = [clients.submit(stream, port, prompt, 1) for prompt in PROMPTS if prompt.answer > 8]
        streamed = [clients.submit(stream, port, prompt) for prompt in PROMPTS]
        assert [each.result() for each in plain] == wanted
        assert [each.result() for each in streamed] == wanted
        assert all(each.result() for each in aborted)
    after = counters(port)
    seen, reduced = "thinsight:vision_tokens_seen_total", "thinsight:prompts_reduced_total"
    images = sum(len(prompt.images) for prompt in PROMPTS)
    more = {name: value - before.get(name, 0) for name, value in after.items()}
    assert more[seen] >= 2 * 16 * images
    assert more[reduced] >= 2 * sum(bool(prompt.images) for prompt in PROMPTS)
    for layers, kept in (("1-2", 10), ("3-4", 5), ("5", 2)):
        assert more[f'thinsight:vision_tokens_kept_total{{layers="{layers}"}}'] * 16 == more[seen] * kept


def test_a_prompt_that_is_kept_whole_is_counted_with_its_reason(port: int) -> None:
    before = counters(port)
    found = json.loads(call(port, "POST", "/v1/chat/completions", body_of(PROMPTS[0], prompt_logprobs=0)))
    assert ids_of(found["choices"][0]["logprobs"]["content"]) == references()["llava"]["full"][0]["ids"]
    more = {name: value - before.get(name, 0) for name, value in counters(port).items()}
    assert more.pop("thinsight:vision_tokens_seen_total") == 16
    assert more.pop('thinsight:prompts_whole_total{reason="prompt_logprobs are wanted"}') == 1
    assert more.pop("thinsight:prompts_reduced_total", 0) == 0
    assert more == {f'thinsight:vision_tokens_kept_total{{layers="{layers}"}}': 16 for layers in ("1-2", "3-4", "5")}


def test_evaluate_scores_it(port: int, tmp_path: Path) -> None:
    from thinsight.job.options import EvaluateOptions
    from thinsight.job.server import evaluate_server

    url = f"http://127.0.0.1:{port}/v1"
    lines = []
    for number in range(6):
        CHECKPOINT.images(PROMPTS[0])[0].save(tmp_path / f"{number}.png")
        lines.append(
            {"id": str(number), "image": f"{number}.png", "question": f"w{30 + number} w40", "answers": ["w1"]}
        )
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = EvaluateOptions(
        server=url, against=url, data=str(tmp_path / "data.jsonl"), metric="agreement", max_new_tokens=6, concurrency=4
    )
    result = evaluate_server(options)
    assert (result.model, result.same) == ("reduced", 1.0)
    assert result.evaluation.score == 1.0
    assert all(result.answers)
