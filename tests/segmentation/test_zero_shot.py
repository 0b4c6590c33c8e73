"""Zero-shot segmentation as the authors evaluate it: from their checkpoints to their scores and label maps, in both
backends."""

import importlib
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from conversion.convert import convert
from groupvit_common.errors import InputError
from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.preprocessing.prompts import average_embedding
from groupvit_common.preprocessing.tokenizer import CLIPTokenizer
from groupvit_common.segmentation import label_maps
from groupvit_common.segmentation.label_maps import View
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.windows import STRIP_VALUES, Windows, interpolated_rows
from groupvit_torch import label_maps as torch_segmentation
from tests.support.backends import BACKENDS
from tests.support.paths import REFERENCE
from tests.support.scores import softmax

pytestmark = pytest.mark.usefixtures("shared_traces")

CASES = ["nv_three_stage", "nv_two_stage"]
# Of the largest score. The reference was computed in float32, as is one of our runs.
SCORES = 1e-5
EMBEDDING = 1e-6
# Where a pixel's two largest group weights differ by less than this, float32 cannot tell which is larger.
TIE = 1e-6
FLOAT64 = 1e-12


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The authors' files, converted."""
    folder = tmp_path_factory.mktemp("zero_shot")
    for case in CASES:
        convert(REFERENCE / "nvlabs" / case / "checkpoint.pth", folder / case)
    return folder


@pytest.fixture(scope="module")
def processor():
    tokenizer = CLIPTokenizer.from_pretrained(REFERENCE / "tokenizer" / "small")
    return GroupViTProcessor(GroupViTImageProcessor(size=64, crop_size=64), tokenizer)


def expected(case):
    """What the authors' code said, by name."""
    arrays = {}
    for name in ("expected", "zero_shot"):
        with np.load(REFERENCE / "nvlabs" / case / f"{name}.npz") as file:
            arrays |= {key: file[key] for key in file.files if not key.startswith("grad.")}
    return arrays


def threshold_of(name):
    """The background threshold in a reference's name, None without a background."""
    return float(name.rsplit("th", 1)[1]) if "_bg1_" in name else None


def segmenter(backend, model, processor, embeddings, **options):
    made = importlib.import_module(f"groupvit_{backend.name}.predictor").Segmenter(model, processor, **options)
    made.set_labels([f"label{i}" for i in range(len(embeddings))], embeddings=embeddings)
    return made


@pytest.mark.parametrize(("case", "dtype"), [(CASES[0], "float64"), (CASES[1], "float32")])
def test_the_authors_protocol_from_their_files(backend, checkpoints, processor, case, dtype):
    reference = expected(case)
    model = backend.load(checkpoints / case, dtype)

    classes, templates, tokens = reference["class_text"].shape
    texts = backend.features(model, "text", input_ids=reference["class_text"].reshape(-1, tokens))
    embeddings = np.stack([average_embedding(e, False) for e in texts.reshape(classes, templates, -1)])
    np.testing.assert_allclose(embeddings, reference["class_embedding"], rtol=0, atol=EMBEDDING)

    ours = segmenter(backend, model, processor, embeddings, top_k=5)
    crop, stride, *size = reference["slide_crop_stride_original"].tolist()
    slides = segmenter(backend, model, processor, embeddings, top_k=5, window=crop, stride=stride)
    for some in (ours, slides):
        look_once(some)
    compared = 0
    for name, theirs in reference.items():
        ours.background = slides.background = threshold_of(name)
        if name.startswith("seg_logits_"):
            pixels = reference[f"seg_input_{name.split('_')[2]}"][0]
            scores = ours.pixel_scores(pixels)
            labels = ours.pixel_labels(pixels, scores.shape[1:]).label_map
            clear = clear_groups(ours, pixels)
            assert (~clear).sum() <= 1
            np.testing.assert_allclose(scores[:, clear], theirs[:, clear], rtol=0, atol=SCORES * theirs.max())
            np.testing.assert_array_equal(labels[clear], theirs.argmax(axis=0)[clear])
        elif name.startswith("slide_labels_"):
            labels = slides.pixel_labels(reference["slide_input"][0], tuple(size)).label_map
            np.testing.assert_array_equal(labels, theirs)
        else:
            continue
        compared += 1
    assert compared == 12


def look_once(segmenter):
    """The model answers a batch that it has seen from memory: background thresholds change nothing before its
    answer."""
    group, known = segmenter._group, {}

    def remembered(pixels, labels):
        key = (pixels.shape, pixels.tobytes())
        if key not in known:
            known[key] = group(pixels, labels)
        return known[key]

    segmenter._group = remembered


def clear_groups(segmenter, pixels):
    """`[H, W]` bool: where the largest group weight is no tie."""
    (grouping,) = segmenter._see_prepared(pixels).view.grouping
    full = np.stack(list(interpolated_rows(np.asarray(grouping, np.float64), pixels.shape[1:])), axis=1)
    second, first = np.sort(full, axis=0)[-2:]
    return first - second > TIE


def test_the_slide_references_are_no_single_colour():
    """The comparison above would mean little if all maps were background."""
    for case in CASES:
        assert len(np.unique(expected(case)["slide_labels_bg0_th0.95"])) >= 4
    assert len(np.unique(expected("nv_two_stage")["slide_labels_bg1_th0.35"])) >= 4


# Where the windows are


def test_the_last_window_ends_with_the_picture():
    windows = Windows.over((88, 104), 64, 32)
    assert windows.tops == (0, 24)
    assert windows.lefts == (0, 32, 40)
    assert [(r.start, r.stop, c.start, c.stop) for r, c in windows][:4] == [
        (0, 64, 0, 64), (0, 64, 32, 96), (0, 64, 40, 104), (24, 88, 0, 64)
    ]  # fmt: skip
    assert len(windows) == 6
    assert Windows.over((64, 96), 64, 32) == Windows((64, 96), (64, 64), (0,), (0, 32))


@pytest.mark.parametrize("picture", [(64, 64), (16, 200), (65, 63), (112, 149), (1, 1)])
@pytest.mark.parametrize(("window", "stride"), [(64, 32), (64, 64), (64, 1), (48, 33)])
def test_windows_cover_the_picture(picture, window, stride):
    windows = Windows.over(picture, window, stride)
    held = np.zeros(picture, dtype=int)
    for rows, columns in windows:
        held[rows, columns] += 1
        assert held[rows, columns].shape == windows.size == (min(window, picture[0]), min(window, picture[1]))
    down, across = windows.counts()
    np.testing.assert_array_equal(held, np.outer(down, across))
    assert held.min() >= 1
    # Every pixel of the resized picture is in one tile.
    tiled = np.zeros((37, 90), dtype=int)
    for _, rows, columns, _, _ in windows.tiles(4, (2, 3), (37, 90)):
        tiled[rows, columns] += 1
    assert (tiled == 1).all()


@pytest.mark.parametrize("stride", [0, -1, 65])
def test_strides_that_leave_pixels_out(stride):
    with pytest.raises(InputError, match="stride of 1 to 64 pixels"):
        Windows.over((64, 64), 64, stride)


# Scores of windows against the plain computation at full resolution


class NumPy:
    """The functions under test, arrays in and out."""

    module, array = label_maps, staticmethod(lambda array: array)

    @classmethod
    def view_scores(cls, affinity, grouping, windows, size, **options):
        view = View(cls.array(affinity), cls.array(grouping), windows)
        parts = cls.module.view_scores(view, size, SegmentationOptions(**options))
        return ((rows, np.asarray(scores)) for rows, scores in parts)

    @classmethod
    def pixel_labels(cls, affinity, grouping, windows, size, is_background=None, **options):
        is_background = [False] * affinity.shape[2] if is_background is None else is_background
        view = View(cls.array(affinity), cls.array(grouping), windows)
        pixels = np.zeros((3, 1, 1))  # of a single view nothing of them is needed
        return cls.module.pixel_labels([view], pixels, size, SegmentationOptions(**options), is_background)


class Torch(NumPy):
    module, array = torch_segmentation, staticmethod(torch.from_numpy)


@pytest.fixture(params=[NumPy, Torch], ids=["numpy", "torch"])
def ops(request):
    return request.param


def random_windows(picture, window=24, stride=10, groups=5, labels=6, seed=0):
    rng = np.random.default_rng(seed)
    windows = Windows.over(picture, window, stride)
    grid = (max(1, windows.size[0] // 4), max(1, windows.size[1] // 4))
    grouping = softmax(rng.normal(size=(len(windows), *grid, groups)) * 3).transpose(0, 3, 1, 2)
    affinity = softmax(rng.normal(size=(len(windows), groups, labels)) * 3)
    # Labels that nothing may have, as with top_k.
    affinity[:, :, 2] = 0
    affinity[: len(windows) // 2, :, 4] = 0
    return windows, affinity, np.ascontiguousarray(grouping)


def plain_scores(windows, affinity, grouping, size, assignment, threshold):
    """`[C, H, W]`, everything at full resolution."""
    total, count = 0, 0
    for (rows, columns), a, g in zip(windows, torch.from_numpy(affinity), torch.from_numpy(grouping), strict=True):
        maps = F.interpolate(g[None], size=windows.size, mode="bilinear")[0]
        if assignment == "hard":
            maps = F.one_hot(maps.argmax(dim=0), len(a)).permute(2, 0, 1).to(a)
        scores = torch.einsum("gl,ghw->lhw", a, maps)
        if threshold is not None:
            below = scores.max(dim=0).values < min(threshold, a.max().item())
            scores = torch.cat([below[None].to(scores), scores])
        around = (columns.start, windows.image[1] - columns.stop, rows.start, windows.image[0] - rows.stop)
        total = total + F.pad(scores, around)
        count = count + F.pad(torch.ones_like(scores[:1]), around)
    return F.interpolate((total / count)[None], size=size, mode="bilinear")[0].numpy()


@pytest.mark.parametrize("strip_values", [1, 3000, 1 << 21])
@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("assignment", ["hard", "soft"])
@pytest.mark.parametrize(("picture", "size"), [((24, 57), (50, 99)), ((44, 30), (21, 18)), ((20, 20), (33, 1))])
def test_windows_against_the_plain_computation(ops, monkeypatch, picture, size, assignment, threshold, strip_values):
    monkeypatch.setattr("groupvit_common.segmentation.windows.STRIP_VALUES", strip_values)
    windows, affinity, grouping = random_windows(picture)
    options = {"assignment": assignment, "background": threshold}
    parts = list(ops.view_scores(affinity, grouping, windows, size, **options))
    expected_scores = plain_scores(windows, affinity, grouping, size, assignment, threshold)
    assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == list(range(size[0]))
    scores = np.concatenate([scores for _, scores in parts], axis=1)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=FLOAT64)

    hidden = [False, True, False, False, False, True]
    pixels = ops.pixel_labels(affinity, grouping, windows, size, is_background=hidden, **options)
    values = np.array([1, 0, 2, 3, 4, 0])
    if threshold is not None:
        values = np.insert(values, 0, 0)
    np.testing.assert_array_equal(pixels.label_map, values[expected_scores.argmax(axis=0)])


def test_groups_of_windows_are_those_of_the_most_central(ops):
    windows, affinity, grouping = random_windows((24, 57))
    size = (48, 114)
    pixels = ops.pixel_labels(affinity, grouping, windows, size, background=0.5)
    assert len(pixels.group_values) == 5 * len(windows)
    for index, (_, columns) in enumerate(windows):
        alone = ops.pixel_labels(
            affinity[index][None], grouping[index][None], Windows.whole((24, 24)), (48, 48), background=0.5
        )
        np.testing.assert_array_equal(pixels.group_values[5 * index : 5 * index + 5], alone.group_values)
        own = pixels.group_map // 5 == index
        shifted = np.zeros(size, dtype=int)
        shifted[:, 2 * columns.start : 2 * columns.stop] = alone.group_map
        np.testing.assert_array_equal(pixels.group_map[own] % 5, shifted[own])
        middle = columns.start + columns.stop
        assert own[:, middle - 1 : middle + 1].all()


@pytest.mark.parametrize("assignment", ["hard", "soft"])
@pytest.mark.parametrize("threshold", [None, 0.6])
def test_the_largest_scores_of_a_whole_image_make_its_map(ops, assignment, threshold):
    _, affinity, grouping = random_windows((24, 24))
    one = (affinity[:1], grouping[:1], None, (31, 60))
    options = {"assignment": assignment, "background": threshold}
    scores = np.concatenate([strip for _, strip in ops.view_scores(*one, **options)], axis=1)
    np.testing.assert_array_equal(scores.argmax(axis=0), ops.pixel_labels(*one, **options).label_map)


@pytest.mark.parametrize("assignment", ["hard", "soft"])
def test_no_more_than_strips_are_held(assignment):
    size = (1000, 1500)
    windows, affinity, grouping = random_windows((48, 72), window=48, stride=24, labels=20)
    tracemalloc.start()
    NumPy.pixel_labels(affinity, grouping, windows, size, assignment=assignment, background=0.5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Both maps have a byte a pixel; of a strip there are a few copies. All scores would take 252 MB.
    assert peak < 2 * 1000 * 1500 + 8 * STRIP_VALUES * affinity.itemsize


def test_where_all_scores_are_zero_the_first_label_stands(ops):
    windows, affinity, grouping = random_windows((24, 57))
    affinity[:] = 0
    assert not ops.pixel_labels(affinity, grouping, windows, (30, 60)).label_map.any()


# The user's door


def picture(seed=0, size=(150, 90)):
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def models(checkpoints):
    """The three-stage model of each backend."""
    return {name: Backend().load(checkpoints / "nv_three_stage") for name, Backend in BACKENDS.items()}


@pytest.fixture
def windowed(backend, models, processor):
    """Sees 107 x 64 pixels of `picture()` in three windows."""
    model = models[backend.name]
    embeddings = expected("nv_three_stage")["class_embedding"]
    return segmenter(backend, model, processor, embeddings, top_k=5, window=64)


def test_a_picture_in_windows_is_its_windows_one_by_one(windowed, backend, processor):
    result = windowed(picture())
    pixels = windowed.prepare(picture())
    assert pixels.shape == (3, 64, 107)
    assert windowed.stride == 32
    assert result.label_map.shape == (90, 150)
    # A graph and eager calls may round otherwise, which may turn a tie.
    for again in (
        windowed.pixel_labels(pixels, (90, 150)).label_map, windowed.pixel_scores(pixels, (90, 150)).argmax(axis=0)
    ):  # fmt: skip
        assert (again == result.label_map).mean() > 0.999
    assert len(np.unique(result.label_map)) > 1

    whole = segmenter(backend, windowed.model, processor, windowed._labelled().embeds, top_k=5)
    total, count = np.zeros((7, 64, 107)), np.zeros((64, 107))
    for left in (0, 32, 43):
        total[:, :, left : left + 64] += whole.pixel_scores(pixels[:, :, left : left + 64])
        count[:, left : left + 64] += 1
    np.testing.assert_allclose(windowed.pixel_scores(pixels), total / count, rtol=0, atol=SCORES)


def test_pictures_of_different_size_share_batches(windowed, monkeypatch):
    seen = []
    group = windowed._group
    monkeypatch.setattr(windowed, "_group", lambda pixels, labels: seen.append(pixels.shape) or group(pixels, labels))
    pictures = [picture(0), picture(1, (90, 90)), picture(2, (80, 90)), picture(3, (90, 140))]
    together = windowed(pictures)
    assert seen == [(8, 3, 64, 64), (1, 3, 64, 64)]
    for result, image in zip(together, pictures, strict=True):
        alone = windowed(image)
        assert result.label_map.shape == (image.height, image.width)
        # Batches multiply their matrices in another order, which may turn a tie.
        assert (result.label_map == alone.label_map).mean() > 0.999


def test_a_window_larger_than_the_picture_sees_it_whole(backend, windowed, processor):
    options = {"top_k": 5, "background": 0.9}
    large = segmenter(backend, windowed.model, processor, windowed._labelled().embeds, window=256, **options)
    whole = segmenter(backend, windowed.model, processor, windowed._labelled().embeds, **options)
    pixels = whole.prepare(picture())
    np.testing.assert_array_equal(large.prepare(picture()), pixels)
    np.testing.assert_allclose(large.pixel_scores(pixels), whole.pixel_scores(pixels), rtol=0, atol=SCORES)
    result = large(picture())
    assert result.labels[0] == "background"
    assert result.group_map.max() < 8


@pytest.mark.parametrize(
    ("size", "seen"),
    # Rounded as the authors' resize does it; beyond 2048 / 448 of the shorter side smaller, in whole patches.
    [((500, 375), (85, 64)), ((375, 500), (64, 85)), ((3000, 300), (293, 32)), ((9000, 9), (293, 8))],
)  # fmt: skip
def test_size_at_which_windows_see_a_picture(windowed, size, seen):
    assert windowed._preparation.size(size[1], size[0]) == seen[::-1]


def test_what_windows_cannot_do(backend, windowed, processor):
    def make(**options):
        return segmenter(backend, windowed.model, processor, windowed._labelled().embeds, **options)

    for window in (0, -8):
        with pytest.raises(InputError, match=f"window must be a whole number of at least 1, got {window}"):
            make(window=window)
    with pytest.raises(InputError, match="multiple of the patch size 8, got 60"):
        make(window=60)
    with pytest.raises(InputError, match="stride of 1 to 64 pixels"):
        make(window=64, stride=65)
    with pytest.raises(InputError, match="give window as well"):
        make(stride=32)
    with pytest.raises(InputError, match=r"must be \[7, 24\], got \[7, 23\]"):
        windowed.set_labels([*"abcdefg"], embeddings=np.ones((7, 23)))
    for shape, message in [
        ((64, 64), "channels, height, width"), ((1, 64, 64), r"\[batch, 3, height, width\]"), ((3, 60, 107), "60 x 64")
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            windowed.pixel_labels(np.zeros(shape, np.float32), (9, 9))
    with pytest.raises(InputError, match="floating point"):
        windowed.pixel_scores(np.zeros((3, 64, 64), np.uint8))


def test_both_backends_give_the_same_maps(checkpoints, processor):
    for case in CASES:
        reference = expected(case)
        crop, stride, *size = reference["slide_crop_stride_original"].tolist()
        embeddings, pixels = (reference[key].astype(np.float64) for key in ("class_embedding", "slide_input"))
        backends = [Backend() for Backend in BACKENDS.values()]
        models = [backend.load(checkpoints / case, "float64") for backend in backends]
        for assignment in ("hard", "soft"):
            options = {"top_k": 3, "background": 0.3, "window": crop, "stride": stride, "assignment": assignment}
            first, *others = (
                segmenter(backend, model, processor, embeddings, **options).pixel_labels(pixels[0], tuple(size))
                for backend, model in zip(backends, models, strict=True)
            )
            for other in others:
                np.testing.assert_array_equal(first.label_map, other.label_map)
                np.testing.assert_array_equal(first.group_map, other.group_map)
                np.testing.assert_array_equal(first.group_values, other.group_values)
