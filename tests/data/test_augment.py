"""Pictures for training: what can be opened, where crops lie, what is done to colours and shapes."""

import io
import math
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from groupvit_common.data.captions.augment import (
    OPERATIONS,
    BadSample,
    augment,
    color_jitter,
    cropped,
    erase,
    rand_augment,
    random_box,
)
from groupvit_common.data.captions.settings import DataSettings, SourceSettings
from tests.support.paths import REFERENCE

FILL = (124, 116, 104)
PLAIN = DataSettings(
    sources=(SourceSettings(kind="folder", path="somewhere"),),
    image_size=16,
    crop_scale=None,
    flip=0,
    rand_augment=0,
    color_jitter=0,
    erasing=0,
)
# Pillow's resampling may round a level otherwise in another version.
ONE_LEVEL = 1


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)
    )


def as_ints(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# ---- RandAugment ----

REFERENCE_CASES = np.load(REFERENCE / "rand_augment.npz")


@pytest.mark.parametrize("name", [name for name in REFERENCE_CASES.files if name != "picture"])
def test_operations_equal_timms(name: str) -> None:
    operation, strength = name.split()
    made = OPERATIONS[operation](
        Image.fromarray(REFERENCE_CASES["picture"]), float(strength), Image.Resampling.BILINEAR, FILL
    )
    assert np.abs(as_ints(made) - REFERENCE_CASES[name]).max() <= ONE_LEVEL


@pytest.mark.parametrize("strength", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_take_every_strength(operation: str, strength: float) -> None:
    made = OPERATIONS[operation](gradient(20, 20), strength, Image.Resampling.BICUBIC, FILL)
    assert made.mode == "RGB"
    assert made.size == (20, 20)
    if strength == 0 and operation not in ("AutoContrast", "Equalize", "Invert", "Posterize"):
        np.testing.assert_array_equal(as_ints(made), as_ints(gradient(20, 20)))


def test_rand_augment_carries_out_half_of_what_it_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, float]] = []
    for name in OPERATIONS:
        monkeypatch.setitem(
            OPERATIONS,
            name,
            lambda image, strength, resample, fill, name=name: (done.append((name, strength)), image)[1],
        )
    rng = np.random.default_rng(0)
    for _ in range(1500):
        rand_augment(gradient(4, 4), replace(PLAIN, rand_augment=2), FILL, rng)
    # 3000 fair coins: 1500 with a standard deviation of 27; five of these.
    assert abs(len(done) - 1500) < 140
    names, strengths = zip(*done, strict=True)
    # Each of fifteen 100 times with a standard deviation of 10.
    assert all(50 < names.count(name) < 150 for name in OPERATIONS)
    assert max(map(abs, strengths)) <= 1
    assert np.abs(strengths).mean() == pytest.approx(0.9, abs=0.01)
    assert abs(np.sign(strengths).mean()) < 0.15


def test_strength_without_spread_is_the_magnitude(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for name in OPERATIONS:
        monkeypatch.setitem(
            OPERATIONS, name, lambda image, strength, resample, fill: (seen.add(abs(strength)), image)[1]
        )
    chosen = replace(PLAIN, rand_augment=5, rand_augment_magnitude=4.0, rand_augment_std=0.0)
    rand_augment(gradient(4, 4), chosen, FILL, np.random.default_rng(0))
    assert seen == {0.4}


# ---- crops ----


@settings(max_examples=40)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    low=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**32),
)
def test_crops_lie_within_the_image(width: int, height: int, low: float, seed: int) -> None:
    left, upper, right, lower = random_box(width, height, (low, 1.0), np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height


def test_crops_have_the_areas_and_aspects_asked_for() -> None:
    rng = np.random.default_rng(1)
    boxes = np.array([random_box(1000, 1000, (0.08, 0.5), rng) for _ in range(2000)])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share = across * down / 1e6
    # Sides are whole pixels.
    assert 0.079 < share.min() < 0.09
    assert 0.49 < share.max() < 0.501
    assert share.mean() == pytest.approx(0.29, abs=0.01)
    aspect = np.log(across / down)
    assert np.abs(aspect).max() < math.log(4 / 3) + 0.01
    assert aspect.mean() == pytest.approx(0, abs=0.02)
    assert boxes[:, 0].min() < 20


def test_a_image_too_narrow_for_any_crop_gives_its_middle() -> None:
    assert random_box(1000, 10, (1.0, 1.0), np.random.default_rng(0)) == (493, 0, 506, 10)
    assert random_box(10, 1000, (1.0, 1.0), np.random.default_rng(0)) == (0, 493, 10, 506)


def test_coarse_decoding_of_a_jpeg_changes_little() -> None:
    """A large JPEG is decoded at a fraction of its size; a PNG of the same image is not."""
    image = gradient(640, 480)
    contents = encode(image, "JPEG", quality=95), encode(image)
    chosen = replace(PLAIN, crop_scale=(0.5, 1.0))
    for seed in range(12):
        coarse, fine = (as_ints(cropped(content, chosen, np.random.default_rng(seed))) for content in contents)
        # A smooth gradient loses no more than JPEG's and the filters' rounding.
        assert np.abs(coarse - fine).max() <= 4


def test_a_jpeg_is_decoded_no_finer_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    crop = Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: (sizes.append(self.size), crop(self, box))[1])
    cropped(encode(gradient(640, 480), "JPEG"), PLAIN, np.random.default_rng(0))
    # The middle square of 480 becomes 16: an eighth (60) is the coarsest that JPEG has.
    assert sizes == [(80, 60)]


def test_without_variation_a_image_is_its_middle_resized() -> None:
    made = augment(encode(gradient(40, 20)), PLAIN, FILL, np.random.default_rng(0))
    expected = gradient(40, 20).crop((10, 0, 30, 20)).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.asarray(made), np.asarray(expected))


def test_flips_are_mirror_images() -> None:
    content = encode(gradient(40, 20))
    flipped, plain = (augment(content, replace(PLAIN, flip=p), FILL, np.random.default_rng(0)) for p in (1, 0))
    np.testing.assert_array_equal(np.asarray(flipped)[:, ::-1], np.asarray(plain))


def test_jitter_stays_within_its_amount() -> None:
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    rng = np.random.default_rng(0)
    # Saturation and contrast do nothing to an even grey: what is seen is the brightness.
    seen = [int(np.asarray(color_jitter(grey, 0.4, rng))[0, 0, 0]) for _ in range(300)]
    assert min(seen) in (59, 60, 61)
    assert max(seen) in (139, 140)
    assert augment(encode(grey), PLAIN, FILL, rng).getpixel((0, 0)) == (100, 100, 100)


def test_rand_augment_takes_the_place_of_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("jitter beside RandAugment")

    monkeypatch.setattr("groupvit_common.data.captions.augment.color_jitter", never)
    augment(encode(gradient(20, 20)), replace(PLAIN, rand_augment=2, color_jitter=0.4), FILL, np.random.default_rng(0))


def test_erased_rectangles() -> None:
    rng = np.random.default_rng(3)
    shares, values = [], []
    for _ in range(300):
        pixels = np.full((3, 60, 80), 7.0, np.float32)
        erase(pixels, rng)
        hole = (pixels != 7).all(axis=0)
        rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        shares.append(hole.mean())
        values.append(pixels[:, hole])
    assert 0.015 < min(shares) < 0.03
    assert 0.32 < max(shares) < 0.345
    noise = np.concatenate([value.ravel() for value in values])
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(1, abs=0.01)


# ---- images of every kind ----


def opened(content: bytes, max_pixels: int = 10**6) -> np.ndarray:
    return as_ints(augment(content, replace(PLAIN, max_pixels=max_pixels), FILL, np.random.default_rng(0)))


def test_images_of_other_modes() -> None:
    plain = gradient(16, 16)
    expected = as_ints(plain)
    grey = as_ints(plain.convert("L"))[..., None].repeat(3, -1)
    deep = Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 257)
    frames = [plain.convert("P"), Image.new("P", plain.size)]
    np.testing.assert_array_equal(opened(encode(plain.convert("L"))), grey)
    np.testing.assert_array_equal(opened(encode(deep)), grey)
    np.testing.assert_array_equal(opened(encode(plain.convert("RGBA"))), expected)
    np.testing.assert_array_equal(opened(encode(plain.convert("P"))), as_ints(plain.convert("P").convert("RGB")))
    np.testing.assert_array_equal(
        opened(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])), as_ints(frames[0].convert("RGB"))
    )
    # JPEG is lossy, more so by way of another colour space.
    assert np.abs(opened(encode(plain.convert("CMYK"), "JPEG", quality=100)) - expected).max() < 16
    assert opened(encode(Image.new("RGB", (1, 1), (9, 8, 7)))).tolist() == [[[9, 8, 7]] * 16] * 16


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_cropped_upright(orientation: int) -> None:
    stored = gradient(120, 60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(stored, exif=exif)
    upright = encode(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    chosen = replace(PLAIN, crop_scale=(0.2, 0.5))
    turned, plain = (augment(each, chosen, FILL, np.random.default_rng(5)) for each in (content, upright))
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(plain))


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_cropped_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(gradient(640, 400), "JPEG", quality=95, exif=exif)
    upright = encode(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    chosen = replace(PLAIN, crop_scale=(0.5, 0.9))
    turned, plain = (as_ints(augment(each, chosen, FILL, np.random.default_rng(5))) for each in (content, upright))
    assert np.abs(turned - plain).max() <= 4


JPEG = encode(gradient(64, 64), "JPEG")
PNG = encode(gradient(64, 64))
GIF, TIFF = (encode(gradient(16, 16), kind) for kind in ("GIF", "TIFF"))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "not an image"),
        (b"<html>404</html>", "not an image"),
        (JPEG[: len(JPEG) // 2], "the image is damaged"),
        (PNG[: len(PNG) // 2], "the image is damaged"),
        (encode(Image.new("RGB", (60, 60))), "the image is too large"),
    ],
)
def test_unusable_images_have_a_cause(content: bytes, cause: str) -> None:
    with pytest.raises(BadSample, match=f"^{cause}$"):
        opened(content, max_pixels=3000 if "large" in cause else 10**6)


@pytest.mark.parametrize("side", [11_000, 20_000])
def test_bombs_are_not_decoded(side: int) -> None:
    """Beyond what Pillow warns of, and what it refuses: the header of a PNG is enough."""
    chunk = b"IHDR" + struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb = PNG[:8] + header + PNG[8 + len(header) :]
    with pytest.raises(BadSample, match="too large"):
        augment(bomb, PLAIN, FILL, np.random.default_rng(0))


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_damage_never_raises_anything_else(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from([JPEG, PNG, GIF, TIFF])))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        made = augment(bytes(content), PLAIN, FILL, np.random.default_rng(0))
    except BadSample:
        return
    assert made.size == (16, 16)
