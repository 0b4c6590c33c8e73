"""Requests that a server must refuse, as bytes, each with the statuses that are right."""

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

Case = tuple[str, bytes, set[int]]


def _image(kind: str = "PNG", size: tuple[int, int] = (48, 32), **options: object) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


PHOTO = _image()
TEXT = base64.b64encode(PHOTO).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of some kilobytes that says to have so many pixels, all of them zero."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(min(width * height * 3, 30_000_000)), 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def request(path: str, body: bytes, kind: str = "application/json", *, length: int | None = None, **more: str) -> bytes:
    """A request as bytes. `length`: what it says of its body, if that is not so long."""
    headers = {
        "Host": "127.0.0.1",
        "Content-Type": kind,
        "Content-Length": str(len(body) if length is None else length),
    }
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in {**headers, **more}.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def as_json(path: str, fields: object) -> bytes:
    """A request of these fields."""
    return request(path, json.dumps(fields).encode())


def form(path: str, image: bytes, boundary: str = "b", **fields: str) -> bytes:
    """A request with an image as a form."""
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n' for n, v in fields.items()]
    parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n')
    body = "".join(parts).encode() + image + f"\r\n--{boundary}--\r\n".encode()
    return request(path, body, f"multipart/form-data; boundary={boundary}")


def images() -> Iterator[tuple[str, bytes, set[int]]]:
    """What is sent as an image, but is none that is taken."""
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', {415}
    yield "xml", b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><svg>&b;</svg>", {415}
    yield "eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n", {415}
    yield "pdf", b"%PDF-1.7\n1 0 obj<<>>endobj", {415}
    yield "text", b"a photo of a cat", {415}
    yield "empty", b"", {422}
    yield "zeros", bytes(5000), {415, 422}
    yield "zip", b"PK\x03\x04" + bytes(200), {415}
    yield "pickle", b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93.", {415, 422}
    for width, height in ((30_000, 30_000), (2_000_000_000, 2), (1, 20_000_000), (0, 5), (4096, 4097)):
        yield f"bomb {width}x{height}", png_bomb(width, height), {413, 415, 422}
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = _image(kind)
        for part in (0.1, 0.5, 0.9):
            yield f"{kind} cut at {part}", whole[: int(len(whole) * part)], {200, 415, 422}
        broken = bytearray(whole)
        broken[len(whole) // 3 : len(whole) // 3 + 40] = b"\xff" * 40
        yield f"{kind} broken", bytes(broken), {200, 413, 415, 422}


def bodies(path: str = "/v1/segment") -> Iterator[Case]:
    """Bodies that are no request."""
    for name, body in {
        "no JSON": b"{",
        "a list": b"[]",
        "a number": b"5",
        "null": b"null",
        "not UTF-8": b'{"labels": "\xff\xfe"}',
        "NaN": b'{"background": NaN}',
        "infinity": b'{"temperature": -Infinity}',
        "a long number": b'{"top_k": ' + b"9" * 100_000 + b"}",
        "deep": b'{"labels":' + b"[" * 40_000 + b"]" * 40_000 + b"}",
        "deeper": b"[" * 2_000_000,
        "many values": b'{"labels":[' + b'"",' * 500_000 + b'""]}',
        "nothing": b"",
        "many names": json.dumps({str(number): 0 for number in range(20_000)}).encode(),
        "a half sign as a name": b'{"\\ud800": 1}',
        "a zero": b'{"labels": "a"}\x00',
    }.items():
        yield name, request(path, body), {400, 422}
    yield "another type", request(path, b"labels=cat", "application/x-www-form-urlencoded"), {415}
    yield "no type", request(path, b"{}", ""), {415}
    yield "gzip", request(path, zlib.compress(b"{}"), **{"Content-Encoding": "gzip"}), {400}
    yield "no boundary", request(path, b"--b--", "multipart/form-data"), {400}
    yield "another boundary", request(path, b"--c\r\n\r\n--c--", "multipart/form-data; boundary=b"), {400, 422}
    yield "an open form", request(path, b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx',
                                  "multipart/form-data; boundary=b"), {400, 422}  # fmt: skip
    field = b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n'
    many = b"".join(field % number for number in range(3000)) + b"--b--\r\n"
    yield "many fields", request(path, many, "multipart/form-data; boundary=b"), {400}
    file = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nx\r\n'
    yield "many files", request(path, file * 3000 + b"--b--\r\n", "multipart/form-data; boundary=b"), {400}
    yield "a long field", form(path, PHOTO, labels="x" * 500_000), {400}
    name = b"--b\r\nContent-Disposition: form-data; name=" + b"n" * 300_000 + b"\r\n\r\n\r\n"
    yield "a long name", request(path, name, "multipart/form-data; boundary=b"), {400, 422}
    yield "too large", request(path, b"", length=10**12), {413}
    yield (
        "too large by chunks",
        (
            b"POST " + path.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + (b"100000\r\n" + bytes(0x100000) + b"\r\n") * 40
        ),
        {413},
    )
    yield "a length that is none", request(path, b"{}", length=-5), {400}


def fields() -> Iterator[tuple[str, dict[str, object], set[int]]]:
    """Fields of a request to segment the photo that cannot be used."""
    good: dict[str, object] = {"image": TEXT, "labels": "cat, dog"}
    bad: dict[str, list[object]] = {
        "labels": ["", " , ", [], [""], ["a", "a"], 5, {"a": "b"}, [["a"]], [5], "a" * 5000, ["x" * 300],
                   "\x00cat", "cat\x1b[31m", ["a\u0007"], "\ud800", "a" + "\t" * 90_000 + "b" * 300,
                   [f"word {n}" for n in range(20_000)],
                   ", ".join(f"w{n}" for n in range(20_000)), "|".join(f"w{n}" for n in range(20_000)), '"', '| "x"',
                   None],
        "background_labels": [5, "\x00", ["cat\ud800"], [f"b{n}" for n in range(20_000)], {"a": 1}],
        "background": [-1, 2, "x", 1e999, [], {}, "1e999", "nan"],
        "temperature": [0, -1, "hot", "inf", 1e999, []],
        "assignment": ["softer", 5, []],
        "top_k": [0, -1, 1.5, 10**30, "many"],
        "refine": [-1, 51, 10**9, 0.5, "x"],
        "foreground": [2, "x", 0.5],
        "synonyms": ["median", 5],
        "templates": ["/etc/passwd", "none", "groupvit_common/py.typed", ["a photo"], [], "{} {}", 5, ["{}"] * 101,
                      "x" * 600 + "{}", "a \x00 {}", {"a": 1}],
        "flip": ["perhaps", 5, []],
        "scales": [[], [0], [-1], [1, 1], [100], ["x"], [0.1] * 9, "1,,x", 5, [1e999]],
        "shorter_side": [0, -1, 10**9, 5000, "x", 1.5],
        "window": [0, -1, 7, 10**9, "x"],
        "stride": [5, 0, "x"],
        "include": [["everything"], "x", 5, ["label_map"] * 50, {}],
        "masks": ["gif", 5, []],
        "backend": ["jax", "tf", "/bin/sh", 5],
        "opacity": [-1, 2, "x", 1e999],
        "image_id": ["gone", "../../etc/passwd", 5, "x" * 200, []],
        "image": ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.png", "", "####", 5, [TEXT], TEXT[:-3],
                  "data:image/png," + TEXT, "data:image/png;base64,", "AAAA" * 100],
        "model": ["demo", "nvidia/groupvit-gcc-yfcc"],
        "device": ["cuda"],
        "url": ["http://169.254.169.254/"],
    }  # fmt: skip
    for name, values in bad.items():
        for number, value in enumerate(values):
            yield f"{name} {number}", {**good, name: value}, {400, 404, 413, 415, 422}
    yield "windows without end", {**good, "window": 16, "stride": 1, "shorter_side": 2000}, {422}
    many = ", ".join(f"word {number}" for number in range(300))
    yield "endless refinement", {**good, "labels": many, "refine": 50, "background": 0.1}, {422}
    yield "no image", {"labels": "cat"}, {422}
    yield "two images", {**good, "image_id": "x"}, {422}


def cases() -> list[Case]:
    """All of them, some 300."""
    every: list[Case] = list(bodies())
    every += [(f"image: {name}", form("/v1/segment", data, labels="cat"), right) for name, data, right in images()]
    every += [
        (f"base64: {name}", as_json("/v1/images", {"image": base64.b64encode(data).decode()}), right | {422})
        for name, data, right in images()
    ]
    for name, given, right in fields():
        every.append(
            (f"JSON: {name}", as_json("/v1/segment", given), right | ({200} if given.get("labels") is None else set()))
        )
    for name, given, right in list(fields())[::3]:
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in given.items() if k != "image"}
        # What a form cannot carry, or writes otherwise, may mean something.
        body = form("/v1/segment", PHOTO, **{k: v.replace("\ud800", "?") for k, v in texts.items()})
        every.append((f"form: {name}", body, right | {200}))
    for path in ("/v1/classify", "/v1/embed/image", "/v1/embed/text"):
        every += [(f"{path}: {name}", body, right) for name, body, right in list(bodies(path))[:8]]
    texts: list[object] = [[], "", "cat", [5], [""] * 2000, ["\x00"], ["x" * 10_000], {"a": 1}, None, [["a"]]]
    every += [(f"texts {n}", as_json("/v1/embed/text", {"texts": text}), {422}) for n, text in enumerate(texts)]
    return every
