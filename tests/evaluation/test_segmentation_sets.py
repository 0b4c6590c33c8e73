"""Segmentation sets in miniature copies of their layouts: what is read, and the errors of missing or wrong files."""

import importlib
import json
import struct
import tomllib
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groupvit_common import cli
from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, make_scene
from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.coco_instances import _unpacked
from groupvit_common.evaluation.datasets.registry import DATASETS
from groupvit_common.evaluation.datasets.segmentation import class_names, open_sets, voc_palette
from tests.support.paths import ROOT

SIZE = (6, 8)  # height, width
RNG = np.random.default_rng(5)
PICTURE = RNG.integers(0, 256, (*SIZE, 3), np.uint8)


def write(path: Path, array: np.ndarray, palette: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(path)
    return path


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def values(*given: int) -> np.ndarray:
    """A mask of `SIZE` that holds the given values in turn."""
    return np.resize(np.array(given, np.uint8), SIZE)


def make_voc(root: Path, stored: np.ndarray) -> Path:
    for name in ("one", "two"):
        write(root / "JPEGImages" / f"{name}.jpg", PICTURE)
        write(root / "SegmentationClass" / f"{name}.png", stored, voc_palette())
    text(root / "ImageSets" / "Segmentation" / "val.txt", "one\ntwo\n")
    text(root / "ImageSets" / "Segmentation" / "train.txt", "two\n")
    return root


def make_context(root: Path, stored: np.ndarray) -> Path:
    write(root / "JPEGImages" / "one.jpg", PICTURE)
    write(root / "SegmentationClassContext" / "one.png", stored)
    text(root / "ImageSets" / "SegmentationContext" / "val.txt", "one\n")
    return root


def make_object(root: Path, stored: np.ndarray) -> Path:
    write(root / "images" / "val2017" / "000000000001.jpg", PICTURE)
    write(root / "annotations" / "val2017" / "000000000001_instanceTrainIds.png", stored)
    return root


def make_stuff(root: Path, stored: np.ndarray) -> Path:
    write(root / "val2017" / "000000000001.jpg", PICTURE)
    write(root / "annotations" / "val2017" / "000000000001.png", stored)
    return root


def make_prepared_stuff(root: Path, stored: np.ndarray) -> Path:
    write(root / "images" / "val2017" / "000000000001.jpg", PICTURE)
    write(root / "annotations" / "val2017" / "000000000001.png", values(3))
    write(root / "annotations" / "val2017" / "000000000001_labelTrainIds.png", stored)
    return root


def make_ade(root: Path, stored: np.ndarray) -> Path:
    write(root / "images" / "validation" / "ADE_val_1.jpg", PICTURE)
    write(root / "annotations" / "validation" / "ADE_val_1.png", stored)
    return root


def make_city(root: Path, stored: np.ndarray) -> Path:
    write(root / "leftImg8bit" / "val" / "ulm" / "ulm_000_leftImg8bit.png", PICTURE)
    write(root / "gtFine" / "val" / "ulm" / "ulm_000_gtFine_labelIds.png", stored)
    write(root / "gtFine" / "val" / "ulm" / "ulm_000_gtFine_instanceIds.png", stored)
    return root


def make_folder(root: Path, stored: np.ndarray) -> Path:
    write(root / "images" / "one.png", PICTURE)
    write(root / "masks" / "one.png", stored)
    text(root / "classes.txt", "background\ncat\ncouch, sofa\n")
    text(root / "odd.txt", "one\n")
    return root


# kind, what makes it, values in the file, classes they mean, how many classes, name of the first
LAYOUTS = [
    ("voc", make_voc, (0, 1, 20, 255), (0, 1, 20, 255), 21, "background"),
    ("voc20", make_voc, (0, 1, 20, 255), (255, 0, 19, 255), 20, "aeroplane"),
    ("context", make_context, (0, 1, 59, 255), (0, 1, 59, 255), 60, "background"),
    ("context59", make_context, (0, 1, 59, 255), (255, 0, 58, 255), 59, "airplane"),
    ("coco-object", make_object, (0, 1, 80, 255), (0, 1, 80, 255), 81, "background"),
    ("coco-stuff", make_stuff, (0, 10, 12, 89, 91, 181, 255), (0, 10, 11, 79, 80, 170, 255), 171, "person"),
    ("coco-stuff", make_prepared_stuff, (0, 11, 170, 255), (0, 11, 170, 255), 171, "person"),
    ("ade20k", make_ade, (0, 1, 150, 255), (255, 0, 149, 255), 150, "wall"),
    ("cityscapes", make_city, (0, 7, 11, 29, 33, 255), (255, 0, 2, 255, 18, 255), 19, "road"),
    ("folder", make_folder, (0, 1, 2, 255), (0, 1, 2, 255), 3, "background"),
]


@pytest.mark.parametrize(("kind", "make", "stored", "meant", "count", "first"), LAYOUTS)
def test_what_a_layout_holds(tmp_path, kind, make, stored, meant, count, first):
    (opened,) = open_sets(f"{kind}:{make(tmp_path / 'set', values(*stored))}")
    assert (len(opened.classes), opened.classes[0]) == (count, first)
    assert opened.has_background == (first == "background")
    assert [label.name for label in opened.labels] == list(opened.classes[opened.has_background :])
    sample = opened[0]
    np.testing.assert_array_equal(sample.mask(), values(*meant))
    assert sample.mask().dtype == np.uint8
    assert (sample.image().height, sample.image().width) == SIZE
    sample.check_size(sample.mask(), sample.image())

    # What is predicted is written as the set would have it.
    drawn = opened.prediction_image(np.arange(count, dtype=np.uint8)[None])
    assert drawn.mode == "P"
    write(sample_mask(tmp_path / "set"), np.resize(np.asarray(drawn), SIZE), voc_palette())
    shown = open_sets(f"{kind}:{tmp_path / 'set'}")[0][0].mask()
    np.testing.assert_array_equal(shown, np.resize(np.arange(count), SIZE))


def sample_mask(root: Path) -> Path:
    """The mask file that belongs to a miniature's first image."""
    prepared = sorted(root.rglob("*TrainIds.png"))
    others = [
        p
        for p in sorted(root.rglob("*.png"))
        if "leftImg" not in p.name and p.parent.name not in ("images", "JPEGImages")
    ]
    return (prepared or [p for p in others if "instanceIds" not in p.name])[0]


@pytest.mark.parametrize(("kind", "make", "stored", "meant", "count", "first"), LAYOUTS)
def test_a_value_that_is_no_class_is_reported(tmp_path, kind, make, stored, meant, count, first):
    root = make(tmp_path, values(*stored))
    write(sample_mask(root), values(*stored, 222), voc_palette())
    with pytest.raises(InputError, match=r"\.png holds the value 222, but .*(holds|names)"):
        open_sets(f"{kind}:{root}")


@pytest.mark.parametrize(("kind", "make", "stored", "meant", "count", "first"), LAYOUTS)
def test_a_mask_of_another_size_is_reported(tmp_path, kind, make, stored, meant, count, first):
    root = make(tmp_path, values(*stored))
    write(sample_mask(root), values(*stored)[:4], voc_palette())
    with pytest.raises(InputError, match="the mask is 8 x 4 pixels, its image 8 x 6"):
        open_sets(f"{kind}:{root}")


@pytest.mark.parametrize(("kind", "make", "stored", "meant", "count", "first"), LAYOUTS)
def test_a_missing_image_is_reported(tmp_path, kind, make, stored, meant, count, first):
    root = make(tmp_path, values(*stored))
    images = [
        p for p in sorted(root.rglob("*")) if p.suffix == ".jpg" or "leftImg" in p.stem or p.parent.name == "images"
    ]
    next(p for p in images if p.is_file()).unlink()
    with pytest.raises(InputError, match=r"(missing, the first is .*: expected .*NAME|no images in)"):
        open_sets(f"{kind}:{root}")


def test_the_folders_above_will_do(tmp_path):
    make_voc(tmp_path / "VOCdevkit" / "VOC2012", values(0, 1))
    for given in (tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2012"):
        assert len(open_sets(f"voc:{given}")[0]) == 2


def test_split_and_limit(tmp_path):
    root = make_voc(tmp_path, values(0, 1))
    assert [sample.name for sample in open_sets(f"voc:{root}", split="train")[0]] == ["two"]
    (few,) = open_sets(f"voc:{root}", limit=1)
    assert [sample.name for sample in few] == ["one"]
    with pytest.raises(IndexError):
        few[1]
    with pytest.raises(InputError, match=r"no list .*test\.txt \(there are train, val\)"):
        open_sets(f"voc:{root}", split="test")
    with pytest.raises(InputError, match="limit must be at least 1"):
        open_sets(f"voc:{root}", limit=0)
    folder = make_folder(tmp_path / "folder", values(0))
    assert open_sets(f"folder:{folder}", split="odd")[0].split == "odd"


def test_a_mask_in_colours_is_reported(tmp_path):
    root = make_voc(tmp_path, values(0, 1))
    write(root / "SegmentationClass" / "one.png", voc_palette()[values(0, 1)])
    with pytest.raises(InputError, match=r"one\.png must hold indices.*mode RGB"):
        open_sets(f"voc:{root}")


def test_a_palette_of_another_order_is_reported_and_a_grey_one_will_do(tmp_path):
    root = make_voc(tmp_path, values(0, 1))
    mask = root / "SegmentationClass" / "one.png"
    write(mask, values(0, 1), voc_palette()[::-1].copy())
    with pytest.raises(InputError, match=r"one\.png has a palette of its own: index 1"):
        open_sets(f"voc:{root}")
    write(mask, values(0, 1), np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1))
    assert open_sets(f"voc:{root}")[0][0].mask().max() == 1
    write(mask, values(0, 1))
    assert open_sets(f"voc:{root}")[0][0].mask().max() == 1


def test_a_background_that_is_not_first_is_reported(tmp_path):
    root = make_folder(tmp_path, values(0, 1))
    text(root / "classes.txt", "cat\nBackground\n")
    with pytest.raises(InputError, match="background after other classes"):
        open_sets(f"folder:{root}")


def test_later_faults_are_reported_when_read(tmp_path):
    root = make_voc(tmp_path, values(0, 1))
    (root / "SegmentationClass" / "two.png").write_bytes(b"no image")
    (root / "JPEGImages" / "two.jpg").write_bytes(b"no image")
    (opened,) = open_sets(f"voc:{root}")
    with pytest.raises(InputError, match=r"two\.png is in no supported image format"):
        opened[1].mask()
    with pytest.raises(InputError, match=r"two\.jpg is in no supported image format"):
        opened[1].image()


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("vok:DIR", "unknown set 'vok:DIR'.*voc, voc20"),
        ("imagenet:DIR", "unknown set 'imagenet:DIR'.*, scenes; imagenet, for classification, is known to"),
        ("voc", "voc needs the folder"),
        ("voc:/nowhere", "no folder /nowhere.*JPEGImages"),
        ("scenes:4", "scenes:1, scenes:2 or scenes:3"),
    ],
)
def test_unknown_sets(spelled, message):
    with pytest.raises(InputError, match=message):
        open_sets(spelled)


@pytest.mark.parametrize("kind", ["voc", "context", "coco-object", "coco-stuff", "ade20k", "cityscapes", "folder"])
def test_an_empty_folder_is_reported_with_the_layout(tmp_path, kind):
    with pytest.raises(InputError, match=r"there is n.* expected .*NAME"):
        open_sets(f"{kind}:{tmp_path}")


def test_images_are_not_rotated(tmp_path):
    root = make_voc(tmp_path, values(0, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(PICTURE).save(root / "JPEGImages" / "one.jpg", exif=exif)
    image = open_sets(f"voc:{root}")[0][0].image()
    assert (image.height, image.width) == SIZE
    assert not image.getexif()


def rectangle(top: int, left: int, bottom: int, right: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def make_instances(root: Path, annotations: list[dict]) -> Path:
    for number in (7, 3):
        write(root / "val2017" / f"{number:012d}.jpg", PICTURE)
    record = {
        "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}, {"id": 17, "name": "cat"}],
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": SIZE[0], "width": SIZE[1]} for n in (7, 3)],
        "annotations": [{"id": i, "image_id": 7, **each} for i, each in enumerate(annotations)],
    }
    text(root / "annotations" / "instances_val2017.json", json.dumps(record))
    return root


def test_coco_objects_from_the_instances_alone(tmp_path):
    pytest.importorskip("pycocotools")
    from pycocotools import mask as coco

    packed = np.zeros(SIZE, np.uint8, order="F")
    packed[5, 6:] = 1
    packed = coco.encode(packed)
    packed["counts"] = packed["counts"].decode()
    root = make_instances(
        tmp_path,
        [
            {"category_id": 17, "area": 2, "segmentation": rectangle(1, 2, 2, 4)},  # a cat before a person
            {"category_id": 1, "area": 16, "segmentation": rectangle(0, 0, 4, 4)},
            # A crowd, as columns of so many pixels outside and inside: the last column's upper half.
            {"category_id": 90, "area": 3, "iscrowd": 1, "segmentation": {"size": list(SIZE), "counts": [42, 3, 3]}},
            {"category_id": 17, "area": 2, "segmentation": packed},
        ],
    )
    (opened,) = open_sets(f"coco-object:{root}")
    assert [sample.name for sample in opened] == ["000000000003", "000000000007"]
    assert not opened[0].mask().any()
    expected = np.zeros(SIZE, np.uint8)
    expected[:4, :4] = 1
    expected[1, 2:4] = 16
    expected[:3, 7] = 80
    expected[5, 6:] = 16
    np.testing.assert_array_equal(opened[1].mask(), expected)
    assert opened.classes[16] == "cat"


SQUARE = rectangle(0, 0, 4, 4)


def test_what_labelling_tools_leave_incomplete_is_left_out_and_reported(tmp_path):
    pytest.importorskip("pycocotools")
    given = [[], [[]], None, [[1, 1, 3, 3]], [[1, 1]], 5, "nonsense", {}, {"size": list(SIZE), "counts": []}]
    annotations = [{"category_id": 1, "area": 1, "segmentation": outline} for outline in given]
    annotations += [
        {"category_id": 1, "area": 1},
        {"category_id": 1, "area": 1, "segmentation": SQUARE, "image_id": 99},
        {"category_id": [], "area": 1, "segmentation": SQUARE, "image_id": None},
        # A single polygon without a list around it, without an area; and the smaller one, without one too, over it.
        {"category_id": 17, "segmentation": rectangle(1, 1, 3, 3)},
        {"category_id": 1, "segmentation": SQUARE[0], "area": None},
    ]
    root = make_instances(tmp_path, annotations)
    message = r"instances_val2017\.json: left out annotations 10 without an outline, "
    message += r"2 of images that the file does not list \(of 14\)$"
    with pytest.warns(UserWarning, match=message):
        (opened,) = open_sets(f"coco-object:{root}")
    expected = np.zeros(SIZE, np.uint8)
    expected[:4, :4] = 1
    expected[1:3, 1:3] = 16
    np.testing.assert_array_equal(opened[1].mask(), expected)


def of(part, **changes):
    """Changes the first record of a part."""
    return lambda record: record[part][0].update(changes)


def change_instances(root: Path, change) -> None:
    path = root / "annotations" / "instances_val2017.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(change(record) or record))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda record: [record], "must hold a JSON object, found an array"),
        (lambda record: record.pop("images") and None, "'images' must be a list of objects"),
        (lambda record: record.update(annotations=[5]), "'annotations' must be a list of objects"),
        (of("annotations", category_id=5), "the annotation 0 is of the category 5, which the file does not list"),
        (of("annotations", category_id=[]), r"the annotation 0 is of the category \[\], which the file"),
        (of("categories", name="forklift"), "'forklift', which is none of the 80 objects; .* folder:DIR"),
        (lambda record: record["categories"].append({"id": 1, "name": "cat"}), "two categories have the id 1"),
        (of("images", height=None), "image 000000000007.jpg needs 'height' and 'width' in pixels, got None and 8"),
        (of("images", width=10**9), "needs 'height' and 'width'"),
        (of("images", height=-6, width=-8), "needs 'height' and 'width'"),
        (of("images", id=3), "the images 000000000007.jpg and 000000000003.jpg both have the id 3"),
        (of("images", id=None), "image 0 of the list needs 'id' and 'file_name'"),
        (of("annotations", image_id=99), "none of its annotations is of an image that it lists"),
        (of("annotations", area=float("nan")), "NaN is not a JSON number"),
    ],
)
def test_a_file_that_holds_no_instances_is_reported(tmp_path, change, cause):
    pytest.importorskip("pycocotools")
    root = make_instances(tmp_path, [{"category_id": 1, "area": 2, "segmentation": SQUARE}])
    change_instances(root, change)
    with pytest.raises(InputError, match=rf"instances_val2017\.json .*{cause}"):
        open_sets(f"coco-object:{root}")


@pytest.mark.parametrize(
    "outline",
    [
        {"size": [8, 6], "counts": [48]},
        {"size": list(SIZE), "counts": [47]},
        {"size": list(SIZE), "counts": [50, -2]},
        {"size": list(SIZE), "counts": "\u732b"},
        {"size": list(SIZE), "counts": "PPPPPPPPPPP"},
        {"counts": [48]},
        [[0, 0, 1, 1, 2, 2, 3]],
        [[0, 0, 1, 1, 2, "3"]],
        [[0, 0, 1, 1, 2, 10**12]],
    ],
)
def test_an_outline_that_is_none_is_reported_with_its_annotation(tmp_path, outline):
    pytest.importorskip("pycocotools")
    root = make_instances(tmp_path, [{"category_id": 17, "area": 2, "segmentation": outline}])
    (opened,) = open_sets(f"coco-object:{root}")
    with pytest.raises(
        InputError, match=r"000000000007\.jpg in .*: the annotation 0 has an outline that cannot be read: its "
    ) as caught:
        opened[1].mask()
    assert "Error" not in str(caught.value)


def test_run_lengths_are_those_of_pycocotools(tmp_path):
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for size in ((1, 1), (6, 8), (300, 200)):
        for share in (0.0, 0.02, 0.5, 1.0):
            inside = np.asfortranarray(rng.random(size) < share, np.uint8)
            counts = _unpacked(coco.encode(inside)["counts"].decode())
            np.testing.assert_array_equal(np.repeat(np.arange(len(counts)) % 2, counts), inside.ravel(order="F"))


def test_images_of_one_name_in_other_folders(tmp_path):
    pytest.importorskip("pycocotools")
    root = make_instances(tmp_path, [])
    for names, expected in (
        (("x/a.jpg", "y/a.jpg"), ["y/a", "x/a"]),
        (("a.jpg", "a.png"), ["a-3", "a-7"]),
        (("../val2017/a.jpg", "b.jpg"), ["b", "a"]),
    ):
        for name in names:
            write(root / "val2017" / name, PICTURE)
        change_instances(
            root,
            lambda record, names=names: (
                [image.update(file_name=name) for image, name in zip(record["images"], names, strict=True)] and None
            ),
        )
        assert [sample.name for sample in open_sets(f"coco-object:{root}")[0]] == expected
    (root / "val2017" / "b.jpg").unlink()
    with pytest.raises(InputError, match="1 of 2 files are missing"):
        open_sets(f"coco-object:{root}")


# ---- files as they lie on disks ----


@pytest.mark.parametrize(("kind", "make", "stored", "meant", "count", "first"), LAYOUTS)
def test_hidden_files_are_no_part_of_a_set(tmp_path, kind, make, stored, meant, count, first):
    root = make(tmp_path, values(*stored))
    names = [sample.name for sample in open_sets(f"{kind}:{root}")[0]]
    for path in list(root.rglob("*.*")):
        if path.is_file():
            (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7")
            (path.parent / ".ipynb_checkpoints").mkdir(exist_ok=True)
            (path.parent / ".ipynb_checkpoints" / path.name).write_bytes(path.read_bytes())
    assert [sample.name for sample in open_sets(f"{kind}:{root}")[0]] == names


def test_two_images_of_one_name_are_reported(tmp_path):
    root = make_city(tmp_path, values(7))
    for city in ("bonn", "ulm"):
        write(root / "leftImg8bit" / "val" / city / "ulm_000_leftImg8bit.png", PICTURE)
        write(root / "gtFine" / "val" / city / "ulm_000_gtFine_labelIds.png", values(7))
    with pytest.raises(InputError, match=r"two images of .* are called ulm_000: rename one"):
        open_sets(f"cityscapes:{root}")


def test_names_in_folders_of_ones_own(tmp_path):
    root = make_folder(tmp_path, values(0, 1))
    write(root / "images" / "my photo.png", PICTURE)
    write(root / "masks" / "my photo.PNG", values(0, 1))
    (root / "odd.txt").write_bytes(b"\xef\xbb\xbfmy photo\r\n\r\none.png\r\n")
    assert [sample.name for sample in open_sets(f"folder:{root}", split="odd")[0]] == ["my photo", "one"]
    assert [sample.name for sample in open_sets(f"folder:{root}")[0]] == ["my photo", "one"]
    for listed, message in (
        ("one\none\n", "has the name one twice"),
        ("../one\n", r"has '\.\./one', which is no name of an image within the set"),
        ("/etc/passwd\n", "which is no name of an image"),
        ("two\n", "names two, which is not in"),
    ):
        text(root / "odd.txt", listed)
        with pytest.raises(InputError, match=message):
            open_sets(f"folder:{root}", split="odd")
    # A narrow blank, as macOS has it in names of screenshots; a letter with its accent beside it.
    for name, listed in (("at 1.00\u202fPM", "at 1.00\u202fPM"), ("e\u0301", "\u00e9")):
        write(root / "images" / f"{name}.png", PICTURE)
        write(root / "masks" / f"{listed}.png", values(0, 1))
        text(root / "odd.txt", f"{listed}\n")
        assert [sample.name for sample in open_sets(f"folder:{root}", split="odd")[0]] == [listed]
    write(root / "images" / "one.jpg", PICTURE)
    with pytest.raises(InputError, match=r"one\.jpg and one\.png have one name but for the suffix"):
        open_sets(f"folder:{root}")


@pytest.mark.parametrize(("bits", "row"), [(4, 0x01 << 8 | 0x20), (2, 0b00_01_10_00 << 8)])
def test_masks_of_few_grey_levels_hold_indices(tmp_path, bits, row):
    """Pillow spreads such levels over 0 to 255: 1 of 15 becomes 17."""
    root = make_folder(tmp_path, values(0, 1))
    mask = root / "masks" / "one.png"
    write(mask, np.zeros(SIZE, np.uint8))
    height, width = SIZE
    line = b"\0" + row.to_bytes(2, "big").ljust(-(-width * bits // 8), b"\0")

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(line * height)) + chunk(b"IEND", b"")
    mask.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    read = open_sets(f"folder:{root}")[0][0].mask()
    assert read[:, :4].tolist() == [[0, 1, 2, 0]] * height


def test_masks_of_other_modes(tmp_path):
    root = make_folder(tmp_path, values(0, 1))
    mask = root / "masks" / "one.png"
    for array in (values(0, 1, 255).astype(np.uint16), values(0, 1).astype(bool)):
        write(mask, array)
        np.testing.assert_array_equal(open_sets(f"folder:{root}")[0][0].mask(), array)
    write(mask, values(0, 1).astype(np.uint16) * 300)
    with pytest.raises(InputError, match=r"one\.png holds the value 300, but classes\.txt names 3 classes"):
        open_sets(f"folder:{root}")
    for mode, cause in (("LA", "transparency beside the indices"), ("RGB", "colours"), ("RGBA", "colours")):
        Image.fromarray(values(0, 1)).convert(mode).save(mask)
        with pytest.raises(InputError, match=rf"must hold indices, .* of mode {mode}: .*{cause}"):
            open_sets(f"folder:{root}")
    write(mask, values(0, 255))
    with pytest.warns(UserWarning, match="holds only 0 and 255, and 255 is no class and is not judged"):
        open_sets(f"folder:{root}")


def test_scenes_are_those_of_validation(tmp_path):
    levels = open_sets("scenes", limit=3)
    assert [opened.kind for opened in levels] == ["scenes:1", "scenes:2", "scenes:3"]
    assert len(open_sets("scenes:2")[0]) == 200
    for level, opened in enumerate(levels, 1):
        assert opened.classes == ("background", *(words[0] for words in LEVELS[level]))
        assert [label.words for label in opened.background_labels] == [tuple(words) for words in BACKGROUNDS]
        scene = make_scene(1_000_003, 2, level)
        np.testing.assert_array_equal(opened[2].mask(), scene.mask)
        np.testing.assert_array_equal(np.asarray(opened[2].image()), scene.image)
    (other,) = open_sets("scenes:1", split="5", limit=1)
    np.testing.assert_array_equal(other[0].mask(), make_scene(5, 0, 1).mask)
    with pytest.raises(InputError, match="a whole number, got 'val'"):
        open_sets("scenes:1", split="val")


def test_names_of_the_authors_and_of_the_sets():
    assert class_names("voc", "set")[11] == "diningtable"
    assert class_names("voc")[11] == "table"
    assert class_names("context")[1] == "airplane"
    assert class_names("context59", "set")[-1] == "wood"
    assert class_names("coco-object", "set")[1:] == class_names("coco-stuff", "set")[:80]
    for kind in ("voc", "context", "coco-object", "coco-stuff", "ade20k", "cityscapes"):
        for names in ("authors", "set"):
            found = class_names(kind, names)
            assert len({name.casefold() for name in found}) == len(found)


@pytest.mark.parametrize("spec", DATASETS.values(), ids=lambda spec: spec.name)
def test_a_row_of_the_registry_is_all_that_a_set_needs(spec, capsys):
    """The set can be opened, and the help and the documentation name it."""
    if spec.task == "segmentation":
        assert callable(importlib.import_module(f"groupvit_common.evaluation.datasets.{spec.module}").open_dataset)
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert f"`{spec.usage}`" in page
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    assert any(line.split(maxsplit=1) == [spec.usage, spec.help] for line in capsys.readouterr().out.split("\n"))


def test_every_renamed_class_exists():
    path = Path(class_names.__code__.co_filename).parent / "segmentation_classes.toml"
    for table in tomllib.loads(path.read_text()).values():
        assert set(table["authors"]) <= set(table["names"])


def test_colours_of_voc():
    """Some entries of the colour map that the VOC development kit documents."""
    expected = {0: (0, 0, 0), 1: (128, 0, 0), 12: (64, 0, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {index: tuple(voc_palette()[index].tolist()) for index in expected} == expected
