"""Images of a request: from data addresses, and from a network where whoever started the server allowed that.

No path of this machine is ever opened. Knows nothing about requests but the field that an image came from.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import re
import urllib.error
import urllib.parse
import urllib.request
import warnings
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..errors import BadInput
from ..evaluation.images import open_image
from .chat import Address
from .errors import BadRequest

_DATA = re.compile(r"data:(?:image/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # others run programs of this machine, as EPS does
_TIMEOUT = 20.0  # seconds
_CHUNK = 2**16  # bytes


@dataclass(frozen=True)
class ImageRules:
    """What images are taken.

    Attributes:
        most_bytes: of one image as it is stored.
        most_pixels: of one image.
        from_network: whether http and https addresses are opened.
        hosts: of these alone, which may then be on a private network; empty: of any public host.
    """

    most_bytes: int
    most_pixels: int
    from_network: bool = False
    hosts: tuple[str, ...] = ()


def load_images(addresses: tuple[Address, ...], rules: ImageRules) -> list[Image.Image]:
    """The images as RGB, upright.

    Raises:
        BadRequest: an address that is not opened here, one that gives no image, or one that is too large.
    """
    return [_opened(_bytes_of(each, rules), each.field, rules) for each in addresses]


def _bytes_of(address: Address, rules: ImageRules) -> bytes:
    url, field = address.url, address.field
    scheme = url[: url.find(":") + 1].lower()
    if scheme == "data:":
        return _from_data(url, field, rules.most_bytes)
    if scheme not in ("http:", "https:"):
        said = repr(scheme) if scheme else "no scheme"
        raise BadRequest(f"{field} has {said}; send the image itself, as data:image/png;base64,...", field)
    if not rules.from_network:
        raise BadRequest(
            f"{field}: this server opens no addresses (it was started without --allow-url-images); send the image "
            "itself, as data:image/png;base64,...",
            field,
        )
    return _fetched(url, field, rules)


def _from_data(url: str, field: str, most: int) -> bytes:
    start = _DATA.match(url)
    if start is None:
        raise BadRequest(f"{field} is no image in base64; write data:image/png;base64,...", field)
    size = (len(url) - start.end()) * 3 // 4
    if size > most + 2:  # padding
        raise _too_large(field, most)
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{field} is no base64 ({error})", field) from None


def _opened(data: bytes, field: str, rules: ImageRules) -> Image.Image:
    if len(data) > rules.most_bytes:
        raise _too_large(field, rules.most_bytes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # PIL raises many kinds
        why = (
            f"truncated, or none of {', '.join(FORMATS)}" if isinstance(error, Image.UnidentifiedImageError) else error
        )
        raise BadRequest(f"{field} is no image: {why}", field) from None
    if image.width * image.height > rules.most_pixels:
        raise BadRequest(
            f"{field} has {image.width} x {image.height} pixels; at most {rules.most_pixels} are taken", field
        )
    try:
        return open_image(image)
    except BadInput as error:
        raise BadRequest(f"{field}: {error}", field) from None


def _too_large(field: str, most: int) -> BadRequest:
    return BadRequest(f"{field} has more than {most} bytes, the most that are taken", field, 413)


# -- from a network ------------------------------------------------------------------------------------------


class _Private(OSError):
    """An address that leads into a private network."""


def _refuse_private(connection: http.client.HTTPConnection) -> None:
    """Looked at once it is connected: a name may mean another machine each time it is asked for."""
    peer = connection.sock.getpeername()[0]
    if not ipaddress.ip_address(peer.split("%")[0]).is_global:
        connection.close()
        raise _Private("it leads into a private network")


class _Http(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _refuse_private(self)


class _Https(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _refuse_private(self)


class _PublicHttp(urllib.request.HTTPHandler):
    def http_open(self, request: Any) -> Any:
        return self.do_open(_Http, request)


class _PublicHttps(urllib.request.HTTPSHandler):
    def https_open(self, request: Any) -> Any:
        return self.do_open(_Https, request)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To the same hosts only, where these were named."""

    def __init__(self, hosts: tuple[str, ...]) -> None:
        self.hosts = hosts

    def redirect_request(self, request: Any, file: Any, code: int, message: str, headers: Any, to: str) -> Any:
        if urllib.parse.urlsplit(to).scheme not in ("http", "https") or not _named(to, self.hosts):
            raise _Private("it leads on to an address that is not opened here")
        return super().redirect_request(request, file, code, message, headers, to)


def _named(url: str, hosts: tuple[str, ...]) -> bool:
    return not hosts or urllib.parse.urlsplit(url).hostname in hosts


def _fetched(url: str, field: str, rules: ImageRules) -> bytes:
    opener = urllib.request.OpenerDirector()  # which knows no schemes but those it is given, and no proxies
    plain = bool(rules.hosts)
    for handler in (
        urllib.request.HTTPHandler() if plain else _PublicHttp(),
        urllib.request.HTTPSHandler() if plain else _PublicHttps(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(rules.hosts),
    ):
        opener.add_handler(handler)
    try:
        if not _named(url, rules.hosts):
            raise _Private("its host is not among those that were allowed (--image-hosts)")
        data, left = [], rules.most_bytes + 1
        with opener.open(url, timeout=_TIMEOUT) as answer:
            while left > 0 and (part := answer.read(min(left, _CHUNK))):
                data.append(part)
                left -= len(part)
    except urllib.error.HTTPError as error:
        raise BadRequest(f"{field} cannot be had: the server there answers {error.code}", field) from None
    except (TimeoutError, OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise BadRequest(f"{field} cannot be had: {why}", field) from None
    return b"".join(data)
