"""Bodies of requests: read within bounds of size and time, JSON or a form of several parts, and images within."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncGenerator
from typing import Any

from PIL import Image
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from groupvit_common.preprocessing.images import ImageHeader, to_rgb
from groupvit_common.serving.pool import in_pool
from groupvit_common.serving.problems import Problem
from groupvit_common.serving.settings import ServeSettings
from groupvit_common.serving.store import Held

# Of a JSON body: a small one may hold millions of lists, each of which takes twenty times its text.
_MOST_VALUES = 50_000
_MOST_FIELDS, _MOST_FIELD_BYTES = 64, 400_000
_PIECE = 1 << 18


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def read_fields(request: Request, settings: ServeSettings, held: Held) -> dict[str, Any]:
    """Returns the fields of a request, `image` as bytes.

    Raises:
        Problem: the body is too large, too slow, or neither JSON nor a form.
        ClientGoneError: the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise Problem(415, "media_type", "send application/json or multipart/form-data")
    # Base64 writes 3 bytes as 4 characters; and the other fields.
    limit = settings.max_bytes * 4 // 3 + 1_000_000 if kind == "application/json" else settings.max_bytes + 500_000
    body = await _read(request, limit, settings, held)
    if kind == "application/json":
        return await in_pool(_json_fields, body, settings.max_bytes)
    return await _form_fields(request, body, settings.max_bytes)


async def _read(request: Request, limit: int, settings: ServeSettings, held: Held) -> bytes:
    refusal = Problem(413, "too_large", f"the request is too large: images may have {settings.max_bytes:,} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise refusal
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            stream = request.stream()
            while True:
                async with asyncio.timeout(settings.idle_seconds):
                    chunk = await anext(stream, None)
                if chunk is None:
                    return bytes(body)
                if len(body) + len(chunk) > limit:
                    raise refusal
                held.take(len(chunk))
                body += chunk
    except TimeoutError:
        raise Problem(408, "slow", "the request came too slowly: send it again") from None
    except ClientDisconnect:
        raise ClientGoneError from None


def _json_fields(body: bytes, most_bytes: int) -> dict[str, Any]:
    if sum(map(body.count, (b"[", b"{", b","))) > _MOST_VALUES:
        raise Problem(422, "too_many_values", f"the JSON has more than {_MOST_VALUES:,} values")
    try:
        fields = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Problem(400, "malformed", "the body is not valid JSON") from None
    if not isinstance(fields, dict):
        raise Problem(400, "malformed", 'the body must be a JSON object, such as {"labels": "cat, dog"}')
    if fields.get("image") is not None:
        fields["image"] = _decoded(fields["image"], most_bytes)
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _decoded(text: object, most_bytes: int) -> bytes:
    """Returns the bytes of an image in base64, with or without "data:image/...;base64," in front."""
    if not isinstance(text, str):
        raise Problem(422, "unusable", "image must be the base64 text of an image file")
    head, separator, _ = text[:200].partition(",")
    if separator and head.startswith("data:"):
        if not head.endswith(";base64"):
            raise Problem(422, "unusable", "image must be a data: URL in base64")
        text = text[len(head) + 1 :]
    elif text[:16].lower().startswith(("http:", "https:", "file:", "ftp:")):
        raise Problem(422, "unusable", "image must be the base64 text of an image file: no address is opened here")
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except (ValueError, binascii.Error):
        raise Problem(422, "unusable", "image is not valid base64") from None
    return _checked(content, most_bytes)


async def _form_fields(request: Request, body: bytes, most_bytes: int) -> dict[str, Any]:
    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), _PIECE):
            yield body[start : start + _PIECE]
            # Other requests are answered meanwhile.
            await asyncio.sleep(0)

    parser = MultiPartParser(
        request.headers, pieces(), max_files=1, max_fields=_MOST_FIELDS, max_part_size=_MOST_FIELD_BYTES
    )
    # Nothing of a request is written to a disk.
    parser.spool_max_size = len(body) + 1
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Problem(400, "malformed", f"the form cannot be read: {error.message}") from None
    except (KeyError, ValueError, UnicodeError):
        raise Problem(400, "malformed", "the form cannot be read") from None
    try:
        return await _of_form(form, most_bytes)
    finally:
        # Those of parts without an end too, which the form has not.
        for file in parser._files_to_close_on_error:
            file.close()


async def _of_form(form: FormData, most_bytes: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise Problem(422, "unusable", "the form has a field twice")
        if isinstance(value, UploadFile):
            if name != "image":
                raise Problem(422, "unusable", "the only file of a form is its field image")
            fields[name] = _checked(value.file.read(), most_bytes)
        elif name == "image":
            fields[name] = await in_pool(_decoded, value, most_bytes)
        else:
            fields[name] = value
    return fields


def _checked(content: bytes, most_bytes: int) -> bytes:
    if not content:
        raise Problem(422, "unusable", "the image is empty")
    if len(content) > most_bytes:
        raise Problem(413, "too_large", f"the image has {len(content):,} bytes: {most_bytes:,} are the most")
    return content


def decoded_image(content: bytes, settings: ServeSettings, held: Held) -> Image.Image:
    """Returns an image file as an upright RGB image: its first one, of an animation.

    Raises:
        InputError: it is no image of a kind that is taken, damaged, or has too many pixels.
        Problem: there is no room for it.
    """
    with ImageHeader(content, "the image", settings.max_pixels) as header:
        width, height = header.stored_size
        # Beyond the bound, decoding refuses before it begins.
        held.take(4 * min(width * height, settings.max_pixels))
        return to_rgb(header.decode(), "the image")
