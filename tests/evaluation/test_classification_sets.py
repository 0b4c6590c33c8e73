"""Classification sets on disk: folders of classes and shards, what is read, and the errors of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.classification import ClassificationSet, open_classification_set
from tests.data.test_sources import write_shard


def found(opened: ClassificationSet) -> list[tuple[str, int]]:
    return [(sample.name, sample.truth) for sample in opened]


def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path: Path) -> None:
    for name in (
        "cat/1.jpg",
        "cat/._1.jpg",
        "cat/Thumbs.db",
        "dog/2.JPG",
        ".ipynb_checkpoints/1.jpg",
        "__MACOSX/cat/1.jpg",
        ".DS_Store",
    ):
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / name).touch()
    (tmp_path / "val" / "cat" / "folder.jpg").mkdir()
    opened = open_classification_set(str(tmp_path))
    assert opened.words == ("cat", "dog")
    assert found(opened) == [("cat/1.jpg", 0), ("dog/2.JPG", 1)]
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"cannot read the classes: .*classes\.txt is not UTF-8 text"):
        open_classification_set(str(tmp_path))


def test_shards_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\r\ndog\r\n")
    (tmp_path / "a").mkdir()
    write_shard(
        tmp_path / "1.tar", [("0.jpg", b""), ("1.jpg", b""), ("0.cls", b"1\n"), ("1.cls", b" 0"), ("._1.cls", b"x")]
    )
    write_shard(
        tmp_path / "a" / "1.tar",
        [("0.jpg", b""), ("0.cls", b"0"), ("2.jpg", b""), ("2.cls", b"0"), ("0.jpg", b""), ("0.cls", b"1")],
    )
    opened = open_classification_set(f"{tmp_path}/{{1,a/1}}.tar")
    # Every name is another, since what is done is known by it.
    assert found(opened) == [("1.tar/0", 1), ("1.tar/1", 0), ("1.tar/0#2", 0), ("1.tar/2", 0), ("1.tar/0#3", 1)]


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (
            "x.tar",
            [("0.jpg", b""), ("0.cls", b"9" * 5000)],
            r"0 in .* is of class '9{20}', but .* names classes 0 to 1",
        ),
        ("x.tar", [("0.jpg", b""), ("0.cls", b"")], "0 in .* is of class ''"),
        (
            "x.tar",
            [("0.jpg", b""), ("0.cls", b"0"), ("0.cls", b"1")],
            "0 in .* cannot be used: two members of the shard have one name",
        ),
        ("x.tar", [("0.jpg", b""), ("1.cls", b"0")], "0 in .* lacks its class"),
        ("x.tar.gz", None, r"x\.tar\.gz: the shard is compressed \(gzip\)"),
        ("x.TGZ", None, r"the shard is compressed \(gzip\)"),
    ],
)
def test_shards_that_cannot_be_used_are_reported(
    tmp_path: Path, name: str, files: list[tuple[str, bytes]] | None, message: str
) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    if files is None:
        (tmp_path / name).write_bytes(b"\x1f\x8b\x08" + bytes(100))
    else:
        write_shard(tmp_path / name, files)
    with pytest.raises(InputError, match=message):
        open_classification_set(str(tmp_path / name))


def test_names_of_classes(classes: Path, tmp_path: Path) -> None:
    assert len(open_classification_set(str(classes), limit=4)) == 4
    assert [p.truth for p in open_classification_set(str(classes), limit=4)] == [0, 1, 2, 3]
    plain = tmp_path / "plain"
    (plain / "polar_bear").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(plain / "polar_bear" / "1.png")
    assert open_classification_set(str(plain)).words == ("polar bear",)
    (plain / "polar_bear").rename(plain / "n02134084")
    with pytest.raises(InputError, match=r"n02134084 have no words.*classes\.txt"):
        open_classification_set(str(plain))
    (plain / "LOC_synset_mapping.txt").write_text("n02134084 ice bear, polar bear\n")
    assert open_classification_set(str(plain)).words == ("ice bear",)
    (plain / "classes.txt").write_text("polar bear\ncat\n")
    with pytest.raises(InputError, match="names 2 classes, but there are 1 folders"):
        open_classification_set(str(plain))
    with pytest.raises(InputError, match=r"there is no folder .*/test"):
        open_classification_set(str(plain), split="test")
