"""A stand-in of the Hub's HTTP API on loopback, as far as pushing small files and reading them back needs it.

It answers what huggingface_hub asks, over HTTP, so that nothing of that library is replaced in the tests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"


class Hub:
    """Its repositories: files by name, and the commits made."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[dict[str, Any]] = []
        self.refuse_cards = False  # as the Hub does where the metadata of a card is no good
        self.url = ""

    @property
    def head(self) -> str:
        return f"{len(self.commits):040x}"

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["key"] == "file":
                value = line["value"]
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
        self.commits.append({"repo": repo, **next(line["value"] for line in lines if line["key"] == "header")})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def _answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/api/validate-yaml":
            bad = [{"message": '"base_model" is not right'}] if self.hub.refuse_cards else []
            return self._answer(400 if bad else 200, {"errors": bad, "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            there = name in self.hub.repos
            self.hub.repos.setdefault(name, {})
            self.hub.private.setdefault(name, bool(asked.get("private")) or asked.get("visibility") == "private")
            return self._answer(409 if there else 200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/[^/]+", self.path):
            files = self.hub.repos[found[1]]
            return self._answer(
                200,
                {
                    "files": [
                        {
                            "path": each["path"],
                            "uploadMode": "regular",
                            "shouldIgnore": False,
                            **({"oid": _oid(files[each["path"]])} if each["path"] in files else {}),
                        }
                        for each in json.loads(body)["files"]
                    ]
                },
            )
        if found := re.fullmatch(r"/api/models/(.+)/commit/[^/]+", self.path):
            self.hub.commit(found[1], [json.loads(line) for line in body.splitlines()])
            url = f"{self.hub.url}/{found[1]}/commit/{self.hub.head}"
            return self._answer(200, {"success": True, "commitOid": self.hub.head, "commitUrl": url})
        return self._answer(404, {"error": f"the stand-in does not know {self.path}"})

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if found[1] not in self.hub.repos:
                return self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            siblings = [{"rfilename": name} for name in self.hub.repos[found[1]]]
            return self._answer(200, {"id": found[1], "sha": self.hub.head, "siblings": siblings, "private": False})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            files = self.hub.repos.get(found[1])
            if files is None:
                return self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            if found[3] not in files:
                missing = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": self.hub.head}
                return self._answer(404, {"error": "Entry not found"}, **missing)
            data = files[found[3]]
            return self._answer(200, data, ETag=f'"{_oid(data)}"', X_Repo_Commit=self.hub.head)
        return self._answer(404, {"error": f"the stand-in does not know {self.path}"})

    do_HEAD = do_GET


def _oid(data: bytes) -> str:
    """As git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
