"""Image loading: every orientation turned once, only formats of pixels, one bound, every mode's values,
downloads."""

import io
import struct
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features

from groupvit_common.data.captions.augment import augment
from groupvit_common.data.captions.settings import DataSettings, SourceSettings
from groupvit_common.errors import InputError
from groupvit_common.preprocessing import download, images
from groupvit_common.preprocessing.image_files import distinct, expand, images_in
from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor
from groupvit_common.preprocessing.images import load_image, stored_image
from groupvit_common.segmentation.figures import write_images

Y, X = np.mgrid[0:24, 0:40]
UPRIGHT = np.stack([X * 6, Y * 10, (X + Y) * 4], axis=2).astype(np.uint8)
# EXIF 2.32, tag 0x0112: what a camera stores of that image.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}
KINDS = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "MPO": {"quality": 100, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "TIFF, LZW": {"compression": "tiff_lzw"},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}
# The lossless ones are exact.
LOSS = {"JPEG": 3, "MPO": 3, "AVIF": 3}


def photo(kind: str, orientation: int) -> bytes:
    """An image file of `UPRIGHT`, stored as that orientation has it."""
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](UPRIGHT)))
    name, options, content = kind.split(",")[0], dict(KINDS[kind]), io.BytesIO()
    if name == "TIFF":
        options["tiffinfo"] = {0x0112: orientation}
    else:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    if name == "MPO":
        options |= {"save_all": True, "append_images": [image]}
    image.save(content, name, **options)
    return content.getvalue()


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def differ(image: Image.Image, expected: np.ndarray) -> int:
    assert (image.height, image.width) == expected.shape[:2]
    return int(np.abs(np.asarray(image.convert("RGB")).astype(int) - expected).max())


# -- orientation --


@pytest.mark.parametrize("kind", KINDS)
def test_turned_once_whatever_the_way_in(kind, tmp_path):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for orientation in STORED:
        content = photo(kind, orientation)
        path = tmp_path / f"{orientation}.jpg"
        path.write_bytes(content)
        once = load_image(path)
        assert differ(once, UPRIGHT) <= LOSS.get(kind, 0)
        sources = (
            content,
            io.BytesIO(content),
            Image.open(io.BytesIO(content)),
            ImageOps.exif_transpose(Image.open(io.BytesIO(content))),
            once,
        )
        for source in sources:
            assert differ(load_image(source), np.asarray(once)) == 0
            assert differ(load_image(load_image(source)), np.asarray(once)) == 0
        pixels = GroupViTImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
        for source in (path, once):
            np.testing.assert_array_equal(pixels(source)["pixel_values"][0].transpose(1, 2, 0), np.asarray(once))


@pytest.mark.parametrize("kind", KINDS)
def test_as_stored_nothing_is_turned_and_nothing_will_be(kind, tmp_path):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for orientation, store in STORED.items():
        (tmp_path / "a").write_bytes(photo(kind, orientation))
        stored = stored_image(tmp_path / "a")
        assert differ(stored, store(UPRIGHT)) <= LOSS.get(kind, 0)
        assert differ(load_image(stored), np.asarray(stored)) == 0


@pytest.mark.parametrize("kind", ["TIFF", "TIFF, LZW", "WEBP", "MPO"])
def test_training_crops_the_upright_image(kind):
    settings = DataSettings(
        sources=(SourceSettings(kind="folder", path="x"),), image_size=16, crop_scale=(0.3, 0.6), rand_augment=0,
        color_jitter=0, prompts=0,
    )  # fmt: skip
    for orientation in (1, 6, 7):
        turned, plain = (
            np.asarray(augment(content, settings, (0, 0, 0), np.random.default_rng(3))).astype(int)
            for content in (photo(kind, orientation), photo("PNG", 1))
        )
        assert np.abs(turned - plain).max() <= LOSS.get(kind, 0)


def test_an_orientation_in_xmp_alone():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](UPRIGHT)))
    for kind, options in (("TIFF", {"tiffinfo": {700: xmp}}), ("WEBP", {"xmp": xmp, "lossless": True})):
        content = encoded(stored, kind, **options)
        assert differ(load_image(load_image(content)), UPRIGHT) == 0


# -- formats --


@pytest.mark.parametrize(
    "prefix", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", b"%PDF-1.7"]
)
def test_documents_are_never_opened(prefix, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "a.jpg").write_bytes(prefix)
    with pytest.raises(InputError, match=r"a\.jpg is in no supported image format: it is P\w+; convert it"):
        load_image(tmp_path / "a.jpg")
    if prefix.startswith(b"%!"):
        with pytest.raises(InputError, match="PostScript"):
            load_image(Image.open(io.BytesIO(prefix)))


def test_what_is_not_opened_is_named():
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    for content, name in ((heic, "HEIC"), (b"8BPS\0\1", "Photoshop"), (b"<svg xmlns=''/>", "SVG")):
        with pytest.raises(InputError, match=f"the image is in no supported image format: it is {name}"):
            load_image(content)
    with pytest.raises(InputError, match='opened as text; open it with mode "rb"'):
        load_image(io.StringIO("x"))


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("jfif", "JPEG"),
        ("jpe", "JPEG"),
        ("mpo", "JPEG"),
        ("jp2", "JPEG2000"),
        ("tga", "TGA"),
        ("avif", "AVIF"),
        ("dib", "DIB"),
        ("pbm", "PPM"),
        ("pcx", "PCX"),
        ("sgi", "SGI"),
        ("qoi", "QOI"),
        ("ico", "ICO"),
        ("apng", "PNG"),
    ],
)
def test_every_suffix_of_these_formats_counts(suffix, kind, tmp_path):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    Image.new("RGB", (16, 16), (200, 30, 40)).save(tmp_path / f"a.{suffix}", kind)
    (path,) = images_in(tmp_path)
    assert np.abs(np.asarray(load_image(path)).astype(int)[5, 5] - (200, 30, 40)).max() < 12


def test_a_folder_leaves_out_what_is_hidden_and_tells_of_what_is_not_opened(tmp_path):
    image = encoded(Image.new("RGB", (4, 4)))
    for name in ("a.png", "._a.png", ".hidden.png", "b.JPG"):
        (tmp_path / name).write_bytes(image)
    for name in ("c.heic", "d.HEIC", "e.svg", "notes.txt", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out in the folder .*: 2 \.heic, 1 \.svg, which are not opened here"):
        assert [path.name for path in images_in(tmp_path)] == ["a.png", "b.JPG"]
    for name in ("a.png", "b.JPG"):
        (tmp_path / name).unlink()
    with pytest.raises(
        InputError, match=r"no images in the folder .*: it has 2 \.heic, 1 \.svg, 1 \.txt; supported are \.apng"
    ):
        images_in(tmp_path)


def test_results_of_an_earlier_run_are_no_images_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = Image.fromarray(UPRIGHT)
    # With a colour profile, which comes before the texts.
    photo.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo.save("a_overlay.png")
    write_images(tmp_path, {"a_input.png": photo, "sheet.png": photo})
    found = {".": "in the folder .", "*.png": r"for the pattern \*.png"}
    for name, where in found.items():
        with pytest.warns(UserWarning, match=f"left out {where}: 2 results of an earlier run"):
            assert [path.name for path in expand([name])] == ["a_overlay.png"]
    assert expand(["a_input.png"]) == [Path("a_input.png")]
    Path("a_overlay.png").unlink()
    for name, where in found.items():
        with pytest.raises(InputError, match=f"no images {where} but 2 results"):
            expand([name])


def test_each_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "x/b.png", ".git/c.png", "other/d.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"")
    try:
        for link in ("loop", "again", "x/up"):  # without care, 2**40 ways
            Path(link).symlink_to(tmp_path, target_is_directory=True)
        Path("0.png").symlink_to(tmp_path / "a.png")
    except OSError:
        pytest.skip("no links here")
    found = expand(["**/*.png"])
    assert {path.resolve() for path in found} == {tmp_path / name for name in ("a.png", "x/b.png", "other/d.png")}
    assert len(found) == 3
    assert Path("a.png") in found  # the file rather than a link to it
    assert len(expand([f"{tmp_path}/**/x/*.png"])) == 1
    assert expand(["a.png", "./a.png", str(tmp_path / "a.png"), "loop/a.png"]) == [Path("a.png")]
    # A link to a file is a name that somebody gave it.
    assert distinct(map(Path, ("a.png", "0.png"))) == [Path("a.png"), Path("0.png")]


# -- bounds --


def webp_header(width: int, height: int) -> bytes:
    """34 bytes that say how large the image is."""
    bits = (width - 1) | (height - 1) << 14
    return (
        b"RIFF"
        + struct.pack("<I", 26)
        + b"WEBPVP8L"
        + struct.pack("<I", 13)
        + b"\x2f"
        + struct.pack("<I", bits)
        + bytes(9)
    )


def png(width: int, height: int, *chunks: bytes, after: bytes = b"") -> bytes:
    """A PNG of a header alone, or with chunks; black where it is small."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes((1 + 3 * width) * height)) if width * height < 10**6 else b""
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    parts += [chunk(part[:4], part[4:]) for part in chunks] + [chunk(b"IDAT", rows)]
    parts += [chunk(after[:4], after[4:])] if after else []
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def icon(inner: bytes) -> bytes:
    """An icon that says 16 x 16 of an image that says otherwise."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


@pytest.mark.parametrize(
    "content", [webp_header(16000, 11000), png(13000, 13000), icon(png(13000, 13000))], ids=["webp", "png", "ico"]
)
def test_bombs_are_refused_by_their_header(content, monkeypatch):
    monkeypatch.setattr(Image.core, "new", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(
        InputError, match=r"the image has \d+x\d+ pixels, more than max_pixels=128000000: make it smaller"
    ):
        load_image(content)


def test_the_bound_is_an_option(tmp_path, monkeypatch):
    content = encoded(Image.new("RGB", (40, 30)))
    assert load_image(content, max_pixels=1200).size == (40, 30)
    for use in (
        lambda: load_image(content, max_pixels=1199),
        lambda: load_image(Image.open(io.BytesIO(content)), max_pixels=1199),
        lambda: GroupViTImageProcessor(max_pixels=1199)(content),
        lambda: GroupViTImageProcessor()(content, max_pixels=1199),
    ):
        with pytest.raises(InputError, match="40x30 pixels, more than max_pixels=1199"):
            use()
    with pytest.raises(InputError, match="max_pixels must be a"):
        load_image(content, max_pixels=0)
    # It is the only one: Pillow's neither refuses nor warns, and is as it was afterwards.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for kind in ("PNG", "TIFF", "WEBP", "GIF"):
        assert load_image(encoded(Image.new("RGB", (40, 30)), kind)).size == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 500


def test_the_bound_is_no_setting_of_a_checkpoint(tmp_path):
    GroupViTImageProcessor(max_pixels=7, extra={"max_pixels": 9}).save_pretrained(tmp_path)
    processor = GroupViTImageProcessor.from_pretrained(tmp_path)
    assert (processor.max_pixels, processor.extra["max_pixels"]) == (images.MAX_PIXELS, 9)
    assert GroupViTImageProcessor.from_pretrained(tmp_path, max_pixels=5).replace(size=8).max_pixels == 5


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_beyond_the_bound_is_read_at_half_its_size(orientation, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(photo("JPEG", orientation))
    with pytest.warns(
        UserWarning, match=r"a\.jpg has .* more than max_pixels=300: it is read at half its height and width"
    ):
        half = load_image(path, max_pixels=300)
    assert differ(half, np.asarray(Image.fromarray(UPRIGHT).resize((20, 12), Image.Resampling.BOX))) <= 4
    with pytest.raises(InputError, match="pixels, more than max_pixels=239"):
        load_image(path, max_pixels=239)
    with pytest.raises(InputError, match="pixels, more than max_pixels=300"):
        stored_image(path, max_pixels=300)


@pytest.mark.parametrize("after", [False, True])
def test_a_png_with_much_text(after):
    text = zlib.compress(b"word " * 500_000)
    long = (b"zTXtComment\0\0" + text, b"iTXtComment\0\1\0\0\0" + text, b"iCCPprofile\0\0" + text)
    xmp = b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>' + b" " * 2_000_000
    for chunk in long:
        content = png(4, 3, xmp, after=chunk) if after else png(4, 3, chunk, xmp)
        assert load_image(content).size == (3, 4)
    with pytest.raises(InputError, match="damaged"):
        load_image(png(4, 3, long[0])[:-40])


def test_a_png_with_many_texts():
    texts = [b"zTXtComment\0\0" + zlib.compress(b"word " * 200_000)] * 80
    xmp = b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'
    assert load_image(png(4, 3, *texts, xmp)).size == (3, 4)


# -- modes --


@pytest.mark.parametrize("scale", [1, 255])
def test_floating_point_files_are_as_arrays(scale, tmp_path):
    ramp = (np.tile(np.linspace(0, 1, 64, dtype=np.float32), (5, 1)) * scale).astype(np.float32)
    Image.fromarray(ramp).save(tmp_path / "f.tif")
    expected = np.asarray(load_image(ramp))
    assert expected.max() == 255
    for source in (tmp_path / "f.tif", Image.fromarray(ramp)):
        np.testing.assert_array_equal(np.asarray(load_image(source)), expected)


@pytest.mark.parametrize("orientation", [1, 3])
def test_a_tiff_of_12_bits(orientation):
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 10 * 12 + 4, 274: orientation, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + b"\x80\x0f\xff"  # 0x800, 0xFFF
    grey = np.asarray(load_image(content))[0, :, 0].tolist()
    assert grey == ([128, 255] if orientation == 1 else [255, 128])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (np.float32([[0, 65535]]), "values from 0 to 65535; expected 0-255, or 0-1"),
        (np.float32([[-1, 1]]), "values from -1 to 1"),
        (np.float32([[np.nan, 1]]), "not finite"),
        (np.float32([[np.inf, 1]]), "not finite"),
        (np.int32([[0, 2_000_000_000]]), "values from 0 to 2000000000; expected 0-255, or 0-65535"),
        (np.int32([[-5, 300]]), "values from -5 to 300"),
        (np.int32([[-5, 3]]), "values from -5 to 3"),
    ],
)
def test_values_that_mean_no_colour(numbers, message, tmp_path):
    image = Image.fromarray(numbers)
    image.save(tmp_path / "f.tif")
    for use in (load_image, GroupViTImageProcessor()):
        with pytest.raises(InputError, match=rf"f\.tif .*{message}"):
            use(tmp_path / "f.tif")
        with pytest.raises(InputError, match=message):
            use(image)


def test_16_bits_in_every_order(tmp_path):
    deep = np.linspace(0, 65535, 60).reshape(6, 10).astype(np.uint16)
    expected = np.rint(deep / 257.0)
    for mode in ("I;16", "I;16L", "I;16B"):
        order = ">u2" if mode == "I;16B" else "<u2"
        image = Image.frombytes(mode, (10, 6), deep.astype(order).tobytes())
        np.testing.assert_array_equal(np.asarray(load_image(image))[..., 0], expected)
    # A dark one is dark: the format says how many bits there are.
    dark = b"P5 2 1 65535\n" + np.uint16([0, 200]).astype(">u2").tobytes()
    assert np.asarray(load_image(dark)).max() == 1


def test_premultiplied_and_lab():
    plain = Image.fromarray(UPRIGHT)
    for mode in ("RGBa", "La"):
        direct = plain.convert("RGBA" if mode == "RGBa" else "LA")
        assert differ(load_image(direct.convert(mode)), np.asarray(direct.convert("RGB"))) == 0
    lab = ImageCms.profileToProfile(
        plain, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert differ(load_image(lab), UPRIGHT) < 40  # 8-bit a and b are coarse
    assert np.abs(np.asarray(load_image(lab)).astype(int) - UPRIGHT).mean() < 4


# -- downloads --


@contextmanager
def server(answers, monkeypatch):
    """Answers by path: a function of the handler."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            with suppress(OSError):
                answers[self.path](self)

        def to(self, where):
            self.send_response(302)
            self.send_header("Location", where)
            self.end_headers()

        def give(self, content, length=None):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)

    monkeypatch.setenv("NO_PROXY", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


def drip(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(200):
        handler.wfile.write(b"\0")
        time.sleep(0.02)


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for _ in range(200):
        handler.wfile.write(b"X")
        time.sleep(0.02)


def test_downloads_stay_within_bounds(monkeypatch):
    content = encoded(Image.new("RGB", (5, 4), (9, 200, 30)))
    answers = {
        "/a.png": lambda h: h.give(content),
        "/%C3%A9%20.png": lambda h: h.give(content),
        "/redirected": lambda h: h.to("/a.png"),
        "/file": lambda h: h.to("file:///etc/hostname"),
        "/ftp": lambda h: h.to("ftp://127.0.0.1/x"),
        "/data": lambda h: h.to("data:image/png;base64,AA"),
        "/bad": lambda h: h.to("http://[::1"),
        "/round": lambda h: h.to("/round"),
        "/short": lambda h: h.give(content, len(content) + 5),
        "/lie": lambda h: h.give(content, 10**10),
        "/none": lambda h: h.send_error(404, "no \x1b]0;x"),
        "/drip": drip,
        "/drip-headers": drip_headers,
    }
    with server(answers, monkeypatch) as address:
        for path in ("/a.png", "/redirected", "/é .png"):
            assert load_image(address + path).getpixel((2, 2)) == (9, 200, 30)
        assert load_image(address.replace("http", "HTTP") + "/a.png").size == (5, 4)
        refused = {
            "/file": "it leads to 'file:",
            "/ftp": "it leads to 'ftp:",
            "/data": "it leads to 'data:",
            "/bad": "cannot be downloaded",
            "/round": "more than 10 times",
            "/short": "breaks off: 5 of its bytes are missing",
            "/lie": "larger than 100 MiB",
            "/none": r"answers 404 no \\x1b",
        }
        monkeypatch.setattr(download, "SECONDS", 5.0)
        for path, message in refused.items():
            with pytest.raises(InputError, match=message):
                load_image(address + path)
        monkeypatch.setattr(download, "SECONDS", 0.3)
        for path in ("/drip", "/drip-headers"):
            with pytest.raises(InputError, match=r"took longer than 0\.3 seconds"):
                load_image(address + path)
        with pytest.raises(InputError, match=r"took longer than 0\.2 seconds"):
            download.download(address + "/drip", seconds=0.2)


@pytest.mark.parametrize(
    "address", ["http://[::1", "http://", "http://.../x", "http://127.0.0.1:x/", "http://h/\ud800"]
)
def test_addresses_that_are_none(address):
    with pytest.raises(InputError, match="cannot be downloaded"):
        load_image(address)


def test_no_way_from_outside_to_this_machine(monkeypatch):
    """A host in the public, as far as the addresses say: here it is this server under another name."""
    content = encoded(Image.new("RGB", (5, 4)))
    kinds = {"public.test": 0, "private.test": 1, "127.0.0.1": 2}
    resolve = download.socket.getaddrinfo
    asked = []

    def as_if(host, *rest, **options):
        asked.append(host)
        return resolve("127.0.0.1", *rest, **options)

    with server({}, monkeypatch) as address:
        port = address.rpartition(":")[2]
    answers = {"/secret": lambda h: h.give(content)}
    with server(answers, monkeypatch) as address:
        port = address.rpartition(":")[2]
        answers |= {f"/to/{host}": (lambda h, host=host: h.to(f"http://{host}:{port}/secret")) for host in kinds}
        monkeypatch.setattr(download.socket, "getaddrinfo", as_if)
        monkeypatch.setattr(download, "_kind", lambda _: kinds[asked[-1]])
        for first in kinds:
            for second in kinds:
                where = f"http://{first}:{port}/to/{second}"
                if kinds[second] <= kinds[first]:
                    assert load_image(where).size == (5, 4)
                else:
                    with pytest.raises(InputError, match=f"it leads from elsewhere to {second} in "):
                        load_image(where)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        ("8.8.8.8", 0),
        ("2606:4700::1", 0),
        ("10.1.2.3", 1),
        ("192.168.0.1", 1),
        ("100.64.0.1", 1),
        ("fd00::1", 1),
        ("127.0.0.1", 2),
        ("127.8.9.1", 2),
        ("::1", 2),
        ("::ffff:127.0.0.1", 2),
        ("2002:7f00:1::", 2),
        ("169.254.169.254", 2),
        ("fe80::1", 2),
        ("0.0.0.0", 2),
    ],
)
def test_kinds_of_hosts(number, kind):
    assert download._kind(number) == kind
    assert download._kind_of_name(number) == kind
    assert download._kind_of_name("localhost") == download._kind_of_name("127.1") == 2
    assert download._kind_of_name("example.org") == 0
