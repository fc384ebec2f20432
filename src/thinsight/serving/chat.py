"""A chat request of the OpenAI API: what of it is understood, and a word for everything else.

A field that would change the answer and is not understood is refused, never ignored. Knows nothing about models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .errors import BadRequest

FULL = "-full"
"""What the name of the model without its reduction ends in."""
_KINDS = ("text", "image_url")  # of the parts of a message
_MOST_STOPS = 4


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _address(given: Any) -> Any:
    return {"url": given} if isinstance(given, str) else given


def _listed(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Address(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # what a model sees of an image is its processor's affair


class _Picture(_Strict):
    type: Literal["image_url"]
    image_url: Annotated[_Address, BeforeValidator(_address)]


_Part = Annotated[_Text | _Picture, Field(discriminator="type")]


class _Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[_Part], BeforeValidator(_parts), Field(min_length=1)]
    name: str | None = None


class _StreamOptions(_Strict):
    include_usage: bool = False


class _Format(_Strict):
    type: Literal["text"]


class _Request(_Strict):
    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_listed), Field(max_length=_MOST_STOPS)
    ] = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # only as what they are where nobody says anything
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    response_format: _Format | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    # of the client's own books, which change no answer
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None


@dataclass(frozen=True)
class Address:
    """Where a request says an image is, and the field that says it."""

    url: str
    field: str


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. None is what the model's own generation config says.

    Attributes:
        max_new_tokens: the longest answer; where the request says none (``fitted``), less if the model has no room.
    """

    max_new_tokens: int
    fitted: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        messages: as a chat template takes them; {"type": "image"} stands where an image belongs.
        addresses: of the images, in their order.
        reduced: whether the reduction is on.
    """

    model: str
    messages: list[dict[str, Any]]
    addresses: tuple[Address, ...]
    sampling: Sampling
    reduced: bool
    stream: bool
    usage: bool  # in a stream, too


def read(body: bytes, name: str, most_images: int, most_tokens: int) -> Asked:
    """A request's body.

    Args:
        body: JSON.
        name: of the model under its reduction; that and `FULL` is the full one.
        most_images: in one request.
        most_tokens: of an answer, and its limit where the request says none.

    Raises:
        BadRequest: it is no such request, or asks for what is not done here.
    """
    try:
        request = _Request.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None
    if request.model not in (name, name + FULL):
        known = f"{name!r} and {name + FULL!r}"
        raise BadRequest(f"model {request.model!r} is not here; there are {known}", "model", 404, "model_not_found")
    messages: list[dict[str, Any]] = []
    addresses: list[Address] = []
    for i, message in enumerate(request.messages):
        content: list[dict[str, Any]] = []
        for j, part in enumerate(message.content):
            if isinstance(part, _Text):
                content.append({"type": "text", "text": part.text})
            else:
                content.append({"type": "image"})
                addresses.append(Address(part.image_url.url, f"messages[{i}].content[{j}].image_url.url"))
        messages.append({"role": message.role, "content": content})
    if len(addresses) > most_images:
        raise BadRequest(f"messages hold {len(addresses)} images; at most {most_images} are taken", "messages")
    return Asked(
        request.model,
        messages,
        tuple(addresses),
        _sampling(request, most_tokens),
        request.model == name,
        bool(request.stream),
        request.stream_options is not None and request.stream_options.include_usage,
    )


def _sampling(request: _Request, most: int) -> Sampling:
    field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    wanted: int | None = getattr(request, field)
    if wanted is not None and wanted > most:
        raise BadRequest(f"{field} is {wanted}; at most {most} are given", field)
    given = {name: getattr(request, name) for name in ("temperature", "top_p", "seed")}
    return Sampling(most if wanted is None else wanted, wanted is None, stop=tuple(request.stop or ()), **given)


def _refusal(error: ValidationError) -> BadRequest:
    """The first thing that is wrong, by its field."""
    first = error.errors(include_url=False)[0]
    kind, place = first["type"], first["loc"]
    if kind == "json_invalid":
        return BadRequest(f"the body is no JSON: {first['ctx']['error']}")
    field = ""
    for i, each in enumerate(place):
        if isinstance(each, int):
            field += f"[{each}]"
        elif not (each in _KINDS and i and isinstance(place[i - 1], int)):  # pydantic's name of a kind of part
            field += f".{each}" if field else each
    if kind == "extra_forbidden":
        return BadRequest(f"{field} is not known to this server: leave it out", field)
    if kind == "missing":
        return BadRequest(f"{field} is missing", field)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return BadRequest(f"{field}.type: a part is one of {', '.join(_KINDS)}", f"{field}.type")
    given = repr(first["input"])
    shown = given if len(given) < 60 else f"{given[:57]}..."
    return BadRequest(f"{field or 'the body'} is {shown}: {first['msg']}", field or None)
