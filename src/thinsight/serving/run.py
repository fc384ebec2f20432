"""Opens what is served, cheapest checks first, and runs the server until it is stopped."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Any

from ..errors import BadInput, MissingPackage
from ..job.findings import ranker_words
from ..job.opening import open_model, reduction_for
from ..job.options import ServeOptions
from ..loading import base_name
from ..progress import Watcher
from ..reduction import Reduction
from .chat import FULL
from .images import ImageRules

KEY = "THINSIGHT_API_KEY"
"""The environment variable of the key that clients must send: a command line is seen by others of the machine."""
_PACKAGES = ("prometheus_client", "starlette", "uvicorn")
_GRACE = 10  # seconds that answers have to end in once the server is told to


class Service:
    """A server that can be run, with its model loaded and its port taken. ``url`` is the API's address."""

    def __init__(self, app: Any, bound: socket.socket, lines: tuple[str, ...], ready: Callable[[str], Any]) -> None:
        import uvicorn

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets=sockets)
                for line in lines if self.started else ():
                    ready(line)

        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=_GRACE
        )
        self._server = Server(config)
        self._socket = bound
        self.url = _url(bound)

    def run(self) -> None:
        """Answer until a signal comes, or `stop` is called from another thread."""
        with self._socket:
            self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """End `run`, after the answers that are under way."""
        self._server.should_exit = True


def open_service(
    options: ServeOptions, watcher: Watcher | None = None, ready: Callable[[str], Any] | None = None
) -> Service:
    """Load the model, put the reduction on it, and take the port.

    Args:
        ready: is told in two lines what runs and where, once the server listens; the watcher if not given.

    Raises:
        ThinsightError: bad input, before the model is loaded; or the reduction cannot be put on it.
    """
    watcher = watcher or Watcher()
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingPackage(f"a server needs {', '.join(missing)}: pip install 'thinsight[serve]'")
    found = reduction_for(options.reduction, options.model.model, options.check())
    key = os.environ.get(KEY) or None
    bound = _bound(options.host, options.port)
    try:
        if key is None and not ip_address(options.host).is_loopback:
            watcher.on_note(f"warning: whoever reaches {options.host} can use this server; set {KEY} to ask for a key")
        watcher.on_stage("Loading the model")
        opened = open_model(options.model)
        watcher.on_note(f"Reduction: {found.where}")
        from .app import Chat, Limits
        from .engine import Engine
        from .metrics import Metrics

        name = options.name or base_name(options.model.model)
        engine = Engine(opened.model, opened.processor, found.reduction, Metrics((name, name + FULL)))
        hosts = options.image_hosts
        rules = ImageRules(
            options.max_image_mib * 2**20, options.max_image_pixels, options.allow_url_images or bool(hosts), hosts
        )
        limits = Limits(options.max_tokens, options.max_images, options.max_waiting, rules)
        chat = Chat(engine, name, limits, options.host, key)
        lines = (
            f"{type(opened.model).__name__} with {described(found.reduction)}",
            f"{_url(bound)}/v1 has models {name!r} (reduced) and {name + FULL!r} (not); images: {_taken(rules)}",
        )
        return Service(chat.app, bound, lines, ready or watcher.on_note)
    except BaseException:
        bound.close()
        raise


def described(reduction: Reduction) -> str:
    """What runs, in one line."""
    runs = [run for run in reduction.schedule.runs() if run[-1] < 1]
    rates = "; ".join(f"{f'layer {a}' if a == b else f'layers {a} to {b}'}: {rate:.4g}" for a, b, rate in runs)
    return f"keep rates {rates}, ranked by {ranker_words(reduction.ranker)}" if runs else "every vision token"


def _taken(rules: ImageRules) -> str:
    if rules.hosts:
        return f"in the request, and from {', '.join(rules.hosts)}"
    return "in the request, and from public hosts" if rules.from_network else "in the request only"


def _bound(host: str, port: int) -> socket.socket:
    """A port that is taken: who connects before the model is loaded waits, and is then answered."""
    family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
        taken.listen()
    except OSError as error:
        taken.close()
        raise BadInput(
            f"host {host!r} and port {port} cannot be listened on ({error.strerror or error}): give another --port, or "
            "an address of this machine"
        ) from None
    return taken


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
