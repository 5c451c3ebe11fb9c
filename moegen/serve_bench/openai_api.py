"""OpenAI's HTTP interface as a load needs it: a request as JSON, its answer as server-sent events, what goes wrong by kind.

By `aiohttp` and without OpenAI's own package, which makes an object of every piece of an answer: a third of a millisecond each, so
that one client, and not the server, would say how many tokens come in a second.

Sources: OpenAI's API reference, chat completions and completions with `stream`; WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import urllib.request
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from ..errors import MeasureError, without_client
from .request import ServerTarget

try:
    import aiohttp
    import yarl
except ModuleNotFoundError as error:
    raise without_client(error) from None

REFUSED, TIMEOUT, BROKEN, EMPTY, MALFORMED = "no connection", "timeout", "broken stream", "no tokens", "malformed reply"
IN_STREAM = "error in the stream"
_PATHS = {"chat": ("chat", "completions"), "completions": ("completions",)}
_SENTENCE = 300
_LISTING_SECONDS = 30.0
_END_SECONDS = 1.0
_END = "[DONE]"


class Failure(Exception):
    """A request failed.

    Attributes:
        kind: the name that it is counted under.
    """

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence[:_SENTENCE])
        self.kind = kind


# ---------------------------------------------------------------- addresses


def url_without_secrets(server: ServerTarget) -> str:
    """The address as results may hold it.

    Raises:
        MeasureError: it is none that can be asked.
    """
    url = _url(server)
    if url.user is not None and server.api_key is not None:
        raise MeasureError("a request has one authorization: give an api_key, or a user in url, not both")
    return str(url.with_user(None).with_query(None).with_fragment(None))


def _url(server: ServerTarget) -> yarl.URL:
    try:
        url = yarl.URL(server.url)
    except ValueError as error:
        raise MeasureError(f"url={server.url!r} is no address: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise MeasureError(f"url={server.url!r} must be like http://127.0.0.1:8000/v1")
    return url


def _below(server: ServerTarget, *parts: str) -> yarl.URL:
    url = _url(server)
    return url.with_path(url.path.rstrip("/")).joinpath(*parts).with_query(url.query)


# ---------------------------------------------------------------- requests


def session(server: ServerTarget) -> aiohttp.ClientSession:
    """Connections to a server: as many as there are requests under way, each kept for the next."""
    headers = {}
    if _url(server).user is None:  # else aiohttp sends that
        headers["Authorization"] = f"Bearer {server.api_key or os.environ.get('OPENAI_API_KEY') or 'none'}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=server.timeout_s),
        trust_env=bool(urllib.request.getproxies()),  # a thread's work for each request
    )


def only_model(server: ServerTarget) -> str:
    """The model that a server has.

    Raises:
        MeasureError: it lists none or several, or does not answer.
    """
    shown = url_without_secrets(server)
    try:
        names = asyncio.run(asyncio.wait_for(_models(server), min(server.timeout_s, _LISTING_SECONDS)))
    except Exception as error:  # a server may answer anything
        why = failure_of(error)
        raise MeasureError(f"{shown} does not say which models it has ({why.kind}): give its name (--model)") from error
    if len(names) != 1:
        raise MeasureError(f"{shown} has {len(names)} models ({', '.join(names[:8])}): name one of them (--model)")
    return names[0]


async def _models(server: ServerTarget) -> list[str]:
    async with session(server) as opened, opened.get(_below(server, "models")) as reply:
        await _check_status(reply)
        return [str(model["id"]) for model in json.loads(await reply.read())["data"]]


async def pieces(opened: aiohttp.ClientSession, server: ServerTarget, text: str, tokens: int) -> AsyncGenerator[Any, None]:
    """Asks for an answer to `text` of at most `tokens` tokens; its pieces as they come, each as its JSON.

    Raises:
        Failure: there is no answer, or it broke off.
    """
    body: dict[str, Any] = {
        "model": server.model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": tokens,
        **({"messages": [{"role": "user", "content": text}]} if server.endpoint == "chat" else {"prompt": text}),
        **server.extra_body,
    }
    events = Events()
    async with opened.post(_below(server, *_PATHS[server.endpoint]), json=body) as reply:
        await _check_status(reply)
        try:
            async for data in reply.content.iter_any():
                for event in events.take(data):
                    if event == _END:
                        await _drain(reply)
                        return
                    yield _read(event)
        except (aiohttp.ClientError, OSError) as error:
            raise Failure(BROKEN, _sentence(error)) from error


async def _drain(reply: aiohttp.ClientResponse) -> None:
    """Reads the end of a reply, so that its connection can serve the next request; a server that sends none is not waited for."""
    if not reply.content.at_eof():
        with contextlib.suppress(asyncio.TimeoutError, aiohttp.ClientError):
            await asyncio.wait_for(reply.content.read(), _END_SECONDS)


async def _check_status(reply: aiohttp.ClientResponse) -> None:
    if reply.status != 200:
        said = (await reply.content.read(4 * _SENTENCE)).decode(errors="replace")
        raise Failure(f"HTTP {reply.status}", f"{reply.status} {reply.reason or ''}: {' '.join(said.split())}".strip(" :"))


def _read(event: str) -> Any:
    piece = json.loads(event)
    if isinstance(piece, dict) and piece.get("error"):
        raise Failure(IN_STREAM, json.dumps(piece["error"]))
    return piece


class Events:
    """The data of server-sent events out of bytes that come in any parts."""

    def __init__(self) -> None:
        self._rest = b""
        self._lines: list[str] = []

    def take(self, data: bytes) -> Iterator[str]:
        """What is complete now."""
        *whole, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n")
        for line in whole:
            field, _, value = line.decode(errors="replace").partition(":")
            if field == "data":
                self._lines.append(value.removeprefix(" "))
            elif not line and self._lines:
                yield "\n".join(self._lines)
                self._lines = []


# ---------------------------------------------------------------- what went wrong


def failure_of(error: Exception) -> Failure:
    """What a request that ended by `error` is counted as."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, asyncio.TimeoutError | aiohttp.ServerTimeoutError):
        return Failure(TIMEOUT, _sentence(error))
    if isinstance(error, aiohttp.ClientError | OSError):
        return Failure(REFUSED, _sentence(error))
    shapeless = isinstance(error, ValueError | AttributeError | TypeError | LookupError)
    return Failure(MALFORMED if shapeless else type(error).__name__, _sentence(error))


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
