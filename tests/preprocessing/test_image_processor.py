"""Pixel values against transformers' CLIPImageProcessor (4.49, Pillow; reference/images), and every way in which an
image, a setting or a file may come."""

import base64
import io
import json
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.preprocessing.image_processor import (
    CLIP_MEAN,
    CLIP_STD,
    AutoImageProcessor,
    GroupViTImageProcessor,
    load_image,
)
from tests.support import paths

REFERENCE = paths.REFERENCE / "images"
EXPECTED = np.load(REFERENCE / "expected.npz")
# The same float32 operations in another order: a few units in the last place of numbers below 3.
FLOAT32_ROUNDING = 2e-6
RAW = {"do_rescale": False, "do_normalize": False}


@pytest.fixture
def photo() -> Image.Image:
    """101 x 67 pixels of smooth colours with noise, no two rows or columns alike."""
    y, x = np.mgrid[0:67, 0:101]
    noise = np.random.default_rng(0).integers(0, 40, (67, 101, 3))
    return Image.fromarray((np.stack([x * 2, y * 3, x + y], axis=2) + noise).clip(0, 255).astype(np.uint8))


def raw(image, **overrides) -> np.ndarray:
    """Levels 0-255 `[3, H, W]` of the image, nothing resized or cropped."""
    processor = GroupViTImageProcessor(do_resize=False, do_center_crop=False, **RAW)
    return processor(image, **overrides)["pixel_values"][0]


def channels_first(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)


# -- numbers --


@pytest.mark.parametrize("name", ["clip", "plain96"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_pixel_values_equal_transformers(name, number):
    processor = GroupViTImageProcessor.from_pretrained(REFERENCE / f"{name}_processor")
    pixels = processor(REFERENCE / f"{number}.png", return_tensors="np").pixel_values
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0], EXPECTED[f"{name}_{number}"], atol=FLOAT32_ROUNDING)


def test_the_defaults_are_clips():
    pixels = GroupViTImageProcessor()([REFERENCE / "0.png", REFERENCE / "1.png"], return_tensors="np").pixel_values
    np.testing.assert_allclose(pixels, np.stack([EXPECTED["clip_0"], EXPECTED["clip_1"]]), atol=FLOAT32_ROUNDING)


def test_rescale_and_normalise(photo):
    levels = channels_first(photo).astype(np.float64)
    processor = GroupViTImageProcessor(do_resize=False, do_center_crop=False)
    expected = (levels / 255 - np.reshape(CLIP_MEAN, (3, 1, 1))) / np.reshape(CLIP_STD, (3, 1, 1))
    np.testing.assert_allclose(processor(photo).pixel_values[0], expected, atol=FLOAT32_ROUNDING)
    half = processor(photo, do_rescale=False, image_mean=127.5, image_std=[127.5] * 3).pixel_values[0]
    np.testing.assert_allclose(half, levels / 127.5 - 1, atol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(processor(photo, rescale_factor=2, do_normalize=False).pixel_values[0], levels * 2)


@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_resample_is_pillows_filter(photo, resample):
    resized = GroupViTImageProcessor(size=(40, 30), resample=resample, do_center_crop=False, **RAW)(photo)
    np.testing.assert_array_equal(resized.pixel_values[0], channels_first(photo.resize((30, 40), resample)))


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((67, 101), 40, (40, 60)),  # 60.3: transformers cuts off the fraction
        ((101, 67), {"shortest_edge": 40}, (60, 40)),
        ((40, 40), {"shortest_edge": 40, "longest_edge": None}, (40, 40)),
        ((67, 101), {"height": 20, "width": 30}, (20, 30)),
        ((67, 101), [20, 30], (20, 30)),
        ((60, 200), {"shortest_edge": 32, "longest_edge": 800}, (32, 106)),
        ((60, 200), {"shortest_edge": 32, "longest_edge": 80}, (24, 80)),  # as transformers 5; 4.x ignores the bound
        ((1, 1000), {"shortest_edge": 32, "longest_edge": 80}, (1, 80)),
    ],
)
def test_resized_size(shape, size, expected):
    processor = GroupViTImageProcessor(size=size, do_center_crop=False)
    assert processor.resized_size(*shape) == expected
    assert processor(Image.new("RGB", shape[::-1])).pixel_values[0].shape == (3, *expected)


@pytest.mark.parametrize(
    ("shape", "crop"), [((6, 9), (4, 4)), ((7, 9), (4, 4)), ((6, 9), (11, 4)), ((5, 6), (8, 9)), ((4, 4), (4, 4))]
)
def test_center_crop(shape, crop):
    image = np.arange(1, np.prod(shape) + 1, dtype=np.uint8).reshape(shape)
    got = GroupViTImageProcessor(do_resize=False, crop_size=crop, **RAW)(image).pixel_values[0]
    # By the definition, pixel by pixel: the middle is kept; an odd pixel to spare goes after, an odd one too few
    # before.
    expected = np.zeros(crop)
    for row in range(crop[0]):
        for column in range(crop[1]):
            y, x = row + (shape[0] - crop[0]) // 2, column + (shape[1] - crop[1]) // 2
            if 0 <= y < shape[0] and 0 <= x < shape[1]:
                expected[row, column] = image[y, x]
    np.testing.assert_array_equal(got, np.stack([expected] * 3))


# -- the mode for segmentation --


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([(448, 16), (64, 8), (100, 16), (10, 16)]),
    st.sampled_from([None, 512, 1000]),
)
def test_segmentation_sizes_are_whole_patches(height, width, sides, longer):
    shorter_side, patch = sides
    got = GroupViTImageProcessor().for_segmentation(shorter_side, patch, longer).resized_size(height, width)
    scale = shorter_side / min(height, width)
    if longer is not None:
        scale = min(scale, longer / max(height, width))
    for side, original in zip(got, (height, width), strict=True):
        assert side % patch == 0
        assert side >= patch
        if longer is not None:
            assert side <= max(longer, patch)
        bounded = longer is not None and original * scale > longer - patch
        # Within half a patch of the exact size, unless that is less than a patch or the bound cuts off.
        assert side == patch or abs(side - original * scale) <= patch * (1 if bounded else 0.5) + 1e-6


def test_segmentation_keeps_the_normalisation_and_the_whole_image(photo):
    processor = GroupViTImageProcessor(image_mean=0.5, image_std=0.25).for_segmentation(shorter_side=64, patch_size=16)
    pixels = processor(photo).pixel_values[0]
    assert pixels.shape == (3, 64, 96)  # 101 / 67 * 64 = 96.5
    resized = channels_first(photo.resize((96, 64), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(pixels, (resized / 255 - 0.5) / 0.25, atol=FLOAT32_ROUNDING)


def test_segmentation_settings_are_saved(tmp_path):
    processor = GroupViTImageProcessor().for_segmentation(longer_side=1024)
    processor.save_pretrained(tmp_path)
    assert GroupViTImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    assert processor.to_dict()["size_divisor"] == 16


# -- what comes in --


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_pil_modes_are_converted_as_pillow_does(photo, mode):
    # Lab, the only other mode, does not come from files of photographs.
    image = (
        photo.convert("RGB").convert("L").convert(mode) if mode in ("1", "LA", "PA", "I", "F") else photo.convert(mode)
    )
    np.testing.assert_array_equal(raw(image), channels_first(image))


def test_transparency_is_dropped(photo):
    alpha = Image.fromarray(np.random.default_rng(0).integers(0, 256, (67, 101), dtype=np.uint8))
    transparent = photo.copy()
    transparent.putalpha(alpha)
    np.testing.assert_array_equal(raw(transparent), channels_first(photo))
    np.testing.assert_array_equal(raw(np.asarray(transparent)), channels_first(photo))


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_a_palette_with_transparency(photo, transparency, tmp_path):
    # As bytes, Pillow would warn, and a warning is an error here.
    image = photo.convert("P")
    expected = channels_first(image)
    image.save(tmp_path / "a.png", transparency=transparency)
    np.testing.assert_array_equal(raw(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bit_grey_is_scaled(dtype, tmp_path):
    deep = np.linspace(0, 65535, 40 * 50).reshape(40, 50).astype(dtype)
    image = Image.fromarray(deep)
    expected = np.rint(deep / 257.0)
    for source in (image, load_image(image)):
        np.testing.assert_array_equal(raw(source), np.stack([expected] * 3))
    if dtype == np.uint16:
        image.save(tmp_path / "deep.png")
        np.testing.assert_array_equal(raw(tmp_path / "deep.png"), np.stack([expected] * 3))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(photo, orientation, tmp_path):
    # What a camera does: the sensor's image is stored turned, and the tag says how to turn it back (EXIF 2.32, tag
    # 0x0112).
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](np.asarray(photo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
    for source in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        np.testing.assert_array_equal(raw(source), channels_first(photo))


def test_damaged_exif_is_ignored(photo, tmp_path):
    photo.save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, about the same damage
        assert load_image(tmp_path / "a.jpg").size == photo.size


def test_every_kind_of_source_gives_the_same(photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    data = (tmp_path / "photo.png").read_bytes()
    array = np.asarray(photo)
    expected = channels_first(photo)
    for source in (
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        data,
        bytearray(data),
        base64.b64encode(data).decode(),
        "data:image/png;base64," + base64.encodebytes(data).decode(),
        io.BytesIO(data),
        photo,
        Image.open(tmp_path / "photo.png"),
        array,
        array.transpose(2, 0, 1),
        array[None],
        array.transpose(2, 0, 1)[None],
        array.astype(np.int64),
        array.astype(np.float64),
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.copy()).permute(2, 0, 1).to(torch.float32).requires_grad_(),
        torch.from_numpy(array.copy())[None],
        [photo],
        (photo,),
    ):
        np.testing.assert_array_equal(raw(source), expected)
    with (tmp_path / "photo.png").open("rb") as file:
        np.testing.assert_array_equal(raw(file), expected)
    np.testing.assert_array_equal(np.asarray(load_image(array.transpose(2, 0, 1))), array)


def test_tensorflow_image(photo):
    tf = pytest.importorskip("tensorflow", exc_type=ImportError)
    np.testing.assert_array_equal(raw(tf.constant(np.asarray(photo))), channels_first(photo))
    bfloat16 = tf.cast(tf.constant(np.full((4, 5, 3), 128)), tf.bfloat16)
    assert (raw(bfloat16) == 128).all()


def test_half_precision_torch_image():
    assert (raw(torch.full((3, 4, 5), 128.0, dtype=torch.bfloat16)) == 128).all()


def test_grey_arrays(photo):
    grey = np.asarray(photo.convert("L"))
    for source in (grey, grey[:, :, None], grey[None]):
        np.testing.assert_array_equal(raw(source), np.stack([grey] * 3))


def test_layout_of_an_ambiguous_array():
    array = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(raw(array), array)  # channels first, as transformers
    np.testing.assert_array_equal(raw(array, input_data_format="channels_last"), array.transpose(2, 0, 1))
    np.testing.assert_array_equal(raw(array, data_format="channels_last"), array.transpose(1, 2, 0))


def test_floats_0_to_1(photo):
    levels = np.asarray(photo)
    scaled = levels.astype(np.float32) / 255
    expected = GroupViTImageProcessor(size=30, crop_size=28)(photo).pixel_values[0]
    got = GroupViTImageProcessor(size=30, crop_size=28, do_rescale=False)(scaled).pixel_values[0]
    np.testing.assert_allclose(got, expected, atol=FLOAT32_ROUNDING)
    np.testing.assert_array_equal(np.asarray(load_image(scaled)), levels)
    # Without a resize nothing is rounded to 8 bits.
    fine = np.random.default_rng(0).random((4, 5, 3), dtype=np.float32)
    np.testing.assert_array_equal(raw(fine), fine.transpose(2, 0, 1))
    with pytest.warns(UserWarning, match="values 0-1 and is rescaled.*do_rescale=False"):
        GroupViTImageProcessor()(scaled)


def test_the_callers_array_is_left_alone():
    for layout in ((3, 8, 9), (8, 9, 3)):
        image = np.random.default_rng(0).integers(0, 256, layout).astype(np.float32)
        before = image.copy()
        GroupViTImageProcessor(do_resize=False, do_center_crop=False)(image)
        np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "is a NoneType; expected a path, bytes"),
        (3, "is a int; expected"),
        ([], "batch of images is empty"),
        (np.zeros((0, 4, 4, 3), np.uint8), "batch of images is empty"),
        ([[[np.zeros((4, 4, 3), np.uint8)]]], "image 0 is a list"),
        (np.zeros(5), r"shape \(5,\); expected \[H, W, C\]"),
        (np.zeros((5, 6, 7)), r"expected 1, 3 or 4 channels"),
        (np.zeros((0, 6, 3)), "is empty"),
        (np.full((4, 4, 3), 3000, np.uint16), "values from 3000 to 3000; expected 0-255"),
        (np.full((4, 4, 3), -0.5), "values from -0.5 to -0.5"),
        (np.full((4, 4, 3), np.nan), "not finite"),
        (np.zeros((4, 4, 3), bool), "dtype bool"),
        (np.zeros((4, 4, 3), complex), "dtype complex128"),
        ("http://127.0.0.1:9/a.png", r"http://127\.0\.0\.1:9/a\.png cannot be downloaded: .*refused"),
        ("no/such.png", "there is no image file no/such.png"),
        (Path(__file__).parent, "it is a directory"),
        (Path(__file__), "test_image_processor.py is in no supported image format"),
        (b"", "image 0 is in no supported image format"),
        ([REFERENCE / "2.png", b"\x89PNG"], "image 1 is in no supported image format"),
        (Image.new("RGB", (200000, 1)), "would be resized to 44800000x224, which is too large"),
    ],
)
def test_bad_images(image, message):
    with pytest.raises(InputError, match=message):
        GroupViTImageProcessor()(image)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "tiff"])
def test_a_truncated_file_is_named(photo, tmp_path, kind):
    path = tmp_path / f"broken.{kind}"
    photo.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for use in (load_image, GroupViTImageProcessor()):
        with pytest.raises(InputError, match=f"broken.{kind} (cannot be read|is in no supported image format)"):
            use(path)


def test_a_decompression_bomb_is_refused(photo, tmp_path):
    photo.save(tmp_path / "large.png")
    with pytest.raises(InputError, match=r"large\.png has 101x67 pixels, more than max_pixels=1000: make it smaller"):
        load_image(tmp_path / "large.png", max_pixels=1000)


# -- what comes out --


def test_return_tensors(photo):
    processor = GroupViTImageProcessor(size=30, crop_size=28)
    arrays = processor([photo, photo], return_tensors="np").pixel_values
    assert (arrays.shape, arrays.dtype) == ((2, 3, 28, 28), np.float32)
    tensors = processor([photo, photo], return_tensors="pt").pixel_values
    assert tensors.dtype == torch.float32
    np.testing.assert_array_equal(tensors.numpy(), arrays)
    as_list = processor(photo).pixel_values
    assert isinstance(as_list, list)
    assert len(as_list) == 1
    assert list(processor(photo)) == ["pixel_values"]
    with pytest.raises(InputError, match="return_tensors must be"):
        processor(photo, return_tensors="jax")
    with pytest.raises(InputError, match="data_format must be"):
        processor(photo, data_format="NHWC")


def test_images_of_several_sizes_need_a_list(photo):
    processor = GroupViTImageProcessor(do_center_crop=False, size=30)
    images = [photo, photo.rotate(90, expand=True)]
    assert [image.shape for image in processor(images).pixel_values] == [(3, 30, 45), (3, 45, 30)]
    with pytest.raises(InputError, match=r"\(3, 30, 45\) and \(3, 45, 30\) cannot share one tensor"):
        processor(images, return_tensors="np")


def test_convert_rgb_off(photo):
    np.testing.assert_array_equal(raw(photo, do_convert_rgb=False), channels_first(photo))
    for grey in (photo.convert("L"), np.asarray(photo.convert("L"))):
        with pytest.raises(InputError, match="do_convert_rgb is off"):
            raw(grey, do_convert_rgb=False)


# -- settings and files --


def test_an_old_feature_extractors_file(tmp_path, photo):
    # The form that transformers wrote before it had image processors: plain integers, fewer keys.
    old = {
        "crop_size": 24,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 24,
        "a_key_of_the_future": {"kept": [1, 2]},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert (processor.size, processor.crop_size) == ({"shortest_edge": 24}, {"height": 24, "width": 24})
    assert (processor.do_rescale, processor.do_convert_rgb) == (True, True)
    processor.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert written["a_key_of_the_future"] == {"kept": [1, 2]}
    assert written["image_processor_type"] == "CLIPImageProcessor"
    again = AutoImageProcessor.from_pretrained(tmp_path / "again")
    assert again.to_dict() == processor.to_dict() == written
    np.testing.assert_array_equal(again(photo).pixel_values, processor(photo).pixel_values)


@pytest.mark.parametrize("name", ["clip", "plain96"])
def test_a_saved_file_has_the_content_of_the_read_one(name, tmp_path):
    folder = REFERENCE / f"{name}_processor"
    GroupViTImageProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    read = json.loads((folder / "preprocessor_config.json").read_text())
    assert written == read


def test_overrides(photo):
    processor = GroupViTImageProcessor.from_pretrained(REFERENCE / "clip_processor", size=50, do_center_crop=None)
    assert (processor.size, processor.do_center_crop) == ({"shortest_edge": 50}, True)
    assert processor(photo, crop_size=20).pixel_values[0].shape == (3, 20, 20)
    assert processor(photo, do_center_crop=False, size=(20, 30)).pixel_values[0].shape == (3, 20, 30)
    assert processor.crop_size == {"height": 224, "width": 224}
    for call in (lambda: processor(photo, do_resise=False), lambda: processor.from_dict({}, do_resise=False)):
        with pytest.raises(
            InputError, match=r"'do_resise' is not a keyword of the image processor .did you mean 'do_resize'"
        ):
            call()


@pytest.mark.parametrize(
    "bad",
    [
        {"size": {"longest_edge": 5}},
        {"size": {"shortest_edge": 0}},
        {"size": (1, 2, 3)},
        {"size": 22.5},
        {"crop_size": {"shortest_edge": 5}},
        {"crop_size": -1},
        {"resample": 9},
        {"resample": "cubic"},
        {"image_mean": [1, 2]},
        {"image_mean": "grey"},
        {"image_std": [0.5, 0, 0.5]},
        {"rescale_factor": float("nan")},
        {"do_resize": "yes"},
        {"size_divisor": 0},
    ],
)
def test_bad_settings(bad, tmp_path):
    with pytest.raises(InputError, match=next(iter(bad))):
        GroupViTImageProcessor(**bad)
    if "rescale_factor" not in bad:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match=r"preprocessor_config\.json holds a setting that cannot be used"):
            GroupViTImageProcessor.from_pretrained(tmp_path)


def test_bad_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        GroupViTImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json cannot be read as JSON"):
        GroupViTImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a file; expected the path of a directory"):
        GroupViTImageProcessor().save_pretrained(tmp_path / "preprocessor_config.json")


def test_an_image_behind_an_address(tmp_path, monkeypatch):
    Image.new("RGB", (5, 4), (10, 200, 30)).save(tmp_path / "green.png")
    (tmp_path / "page.html").write_text("<html>not here</html>")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            assert load_image(f"{address}/green.png").getpixel((2, 2)) == (10, 200, 30)
            with pytest.raises(InputError, match=r"page\.html is in no supported image format"):
                load_image(f"{address}/page.html")
            with pytest.raises(InputError, match=r"missing\.png cannot be downloaded: .*404|Not Found|File not found"):
                load_image(f"{address}/missing.png")
            monkeypatch.setattr("groupvit_common.preprocessing.download.BYTES", 20)
            with pytest.raises(InputError, match="is larger than"):
                load_image(f"{address}/green.png")
        finally:
            server.shutdown()
            thread.join()


def test_keywords_of_from_pretrained(tmp_path, monkeypatch):
    GroupViTImageProcessor(size=40, extra={"kept": 1}).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "hf_SECRET", "use_auth_token": "hf_SECRET"}))
    with pytest.raises(InputError, match="pass token= alone"):
        AutoImageProcessor.from_pretrained(tmp_path, use_auth_token="hf_SECRET", token="hf_OTHER")
    with pytest.raises(InputError, match=r"'sizes' is not a keyword of the image processor .*; these are: .*size"):
        AutoImageProcessor.from_pretrained(tmp_path, sizes=3)
    with pytest.warns(UserWarning, match="'padding_value' is not a keyword of the image processor and has no effect"):
        AutoImageProcessor.from_pretrained(tmp_path, padding_value=1.0)
    asked = []
    monkeypatch.setattr(
        "groupvit_common.preprocessing.image_processor.resolve",
        lambda *_, location, **__: asked.append(location.force_download) or tmp_path,
    )
    loaded = AutoImageProcessor.from_pretrained(
        "org/name", force_download=True, token="hf_SECRET", use_fast=True, trust_remote_code=True, crop_size=9
    )
    assert asked == [True]
    assert loaded.crop_size == {"height": 9, "width": 9}
    # A secret that some file already holds is not passed on either.
    assert loaded.extra == AutoImageProcessor.from_pretrained(tmp_path).extra
    assert loaded.extra["kept"] == 1
    assert "hf_SECRET" not in json.dumps(loaded.to_dict())
