"""Shards, tables and folders: which samples are found, and what is said of broken ones."""

import io
import json
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupvit_common.data.captions.settings import DataSettings, SourceSettings
from groupvit_common.data.captions.sources import ROWS_PER_UNIT, ByteRange, Entry, Source, expand_files, open_source
from groupvit_common.data.captions.stream import count_samples
from groupvit_common.errors import InputError


def write_shard(path: Path, files: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def source(kind: str, path: Path | str, **more: object) -> Source:
    return open_source(SourceSettings(kind=kind, path=str(path), **more))


def content(place: ByteRange | bytes | None) -> bytes | None:
    if not isinstance(place, ByteRange):
        return place
    whole = Path(place.path).read_bytes()
    return whole if place.size is None else whole[place.offset : place.offset + place.size]


def contents(entries: Iterable[Entry]) -> list[tuple[str, bytes | None, bytes | None]]:
    return [(entry.key, content(entry.image), content(entry.caption)) for entry in entries]


def all_entries(opened: Source) -> list[Entry]:
    units = [opened.unit(number) for number in range(len(opened))]
    assert all(unit.fault is None for unit in units)
    return [entry for unit in units for entry in unit.entries]


# ---- files by pattern ----


def test_patterns(tmp_path: Path) -> None:
    for name in ("a-00.tar", "a-01.tar", "a-02.tar", "b.tar"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a-03.tar").touch()

    def names(pattern: str) -> list[str]:
        return [Path(name).name for name in expand_files(f"{tmp_path}/{pattern}", "shards")]

    assert names("a-{00..02}.tar") == ["a-00.tar", "a-01.tar", "a-02.tar"]
    assert names("{b,a-01}.tar") == ["b.tar", "a-01.tar"]
    assert names("*.tar") == ["a-00.tar", "a-01.tar", "a-02.tar", "b.tar"]
    assert names("**/a-*.tar") == ["a-00.tar", "a-01.tar", "a-02.tar", "a-03.tar"]
    assert names("{b,a-*}.tar") == ["b.tar", "a-00.tar", "a-01.tar", "a-02.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a-{00..03}.tar", r"2 of the 4 shards of .*a-\{00\.\.03\}\.tar are not there, the first is .*a-02\.tar"),
        ("c*.tar", r"no file matches .*c\*\.tar"),
        ("a-{00.tar", "the braces in .* do not match"),
        ("pipe:cat a-00.tar", "must be files of this machine, got pipe:"),
        ("s3://bucket/{00..02}.tar", "must be files of this machine, got s3://"),
    ],
)
def test_bad_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a-00.tar", "a-01.tar"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        expand_files(pattern, "shards")


@pytest.mark.parametrize(
    ("package", "kind", "path"), [("braceexpand", "webdataset", "{a,b}.tar"), ("pyarrow", "table", "a.csv")]
)
def test_a_missing_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, kind: str, path: str
) -> None:
    (tmp_path / "a.csv").write_text("image,caption\n")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"need the package {package}: pip install 'groupvit\[data\]'$"):
        source(kind, tmp_path / path)


# ---- shards ----

FILES = [
    ("0001.jpg", b"one"),
    ("0001.json", b"{}"),
    ("0001.txt", b"the first"),
    ("0002.txt", b"the second"),
    ("0002.PNG", b"two" * 500),
    ("folder/0003.webp", b""),
    ("folder/0003.txt", b"with a folder"),
    ("0004.jpg", b"four"),
    ("0005.txt", b"no picture"),
    ("very/" * 40 + "long.jpg", b"long"),
    ("very/" * 40 + "long.txt", "ä".encode()),
]
SAMPLES = [
    ("0001", b"one", b"the first"),
    ("0002", b"two" * 500, b"the second"),
    ("folder/0003", b"", b"with a folder"),
    ("0004", b"four", None),
    ("0005", None, b"no picture"),
    ("very/" * 40 + "long", b"long", "ä".encode()),
]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_shards_of_every_tar_format(tmp_path: Path, format: int) -> None:
    shard = write_shard(tmp_path / "a.tar", FILES, format)
    assert contents(all_entries(source("webdataset", shard))) == SAMPLES


def test_what_is_no_sample_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("._0001.jpg", ".hidden", "README", "0001.jpg", "0001.txt", "0001.cls"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert contents(all_entries(source("webdataset", path))) == [("0001", b"", b"")]


def test_captions_by_another_name(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [("1.jpg", b"1"), ("1.txt", b"alt text"), ("1.Caption", b"better")])
    assert contents(all_entries(source("webdataset", shard, caption_suffix="caption"))) == [("1", b"1", b"better")]


def test_count_samples_of_complete_ones_by_weight(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", FILES)
    settings = SourceSettings(kind="webdataset", path=str(shard))
    assert count_samples(DataSettings(sources=(settings,))) == 4
    doubled = SourceSettings(kind="webdataset", path=str(shard), weight=2.5)
    assert count_samples(DataSettings(sources=(settings, doubled))) == 14


def made_shard(folder: Path) -> bytes:
    files = [(f"{n:04d}.{kind}", bytes([n]) * 700) for n in range(5) for kind in ("jpg", "txt")]
    return write_shard(folder / "whole.tar", files).read_bytes()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_truncated_shard_keeps_what_is_whole(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("shards")
    whole = made_shard(folder)
    last = 10 * (512 + 1024)  # headers and contents, padded; then come the zeros that end an archive
    length = data.draw(st.integers(1, last - 1))
    (folder / "cut.tar").write_bytes(whole[:length])
    opened = source("webdataset", folder / "cut.tar")
    unit = opened.unit(0)
    complete = [(f"{n:04d}", bytes([n]) * 700, bytes([n]) * 700) for n in range(5)]
    found = contents(unit.entries)
    # Between two files nothing shows that there were more.
    at_a_border = length % (512 + 1024) == 0
    assert (unit.fault is None) == at_a_border
    # A last sample whose contents are whole may lack its padding only.
    full = [sample for n, sample in enumerate(complete) if length >= n * 3072 + 1536 + 512 + 700]
    assert found[: len(full)] == full
    assert len(found) <= len(full) + at_a_border


def test_a_damaged_header_is_noticed(tmp_path: Path) -> None:
    whole = bytearray(made_shard(tmp_path))
    whole[4 * 1536 + 20] ^= 255  # in the header of the third sample's image
    (tmp_path / "bad.tar").write_bytes(whole)
    unit = source("webdataset", tmp_path / "bad.tar").unit(0)
    assert [entry.key for entry in unit.entries] == ["0000", "0001"]
    assert unit.fault == "the shard is damaged"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "the shard is truncated or not a tar file"),
        (b"not a tar", "the shard is truncated or not a tar file"),
        (bytes(10240), "the shard has no members"),
        (b"\x1f\x8b\x08" + bytes(5000), "the shard is compressed (gzip); unpack it"),
        (b"\x28\xb5\x2f\xfd" + bytes(5000), "the shard is compressed (zstd); unpack it"),
        (b"BZh91AY" + bytes(5000), "the shard is compressed (bzip2); unpack it"),
    ],
)
def test_what_is_no_tar_is_a_fault(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    unit = source("webdataset", tmp_path / "a.tar").unit(0)
    assert unit.entries == []
    assert unit.fault is not None
    assert unit.fault.startswith(fault)


def listed(
    path: Path, names: Iterable[str | tuple[str, bytes, str]]
) -> list[tuple[str, bytes | None, bytes | None, str | None]]:
    """What is found in a shard of members whose content is their number, or of a type with the name it links to."""
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name if isinstance(name, str) else name[0])
            if isinstance(name, tuple):
                _, member.type, member.linkname = name
                tar.addfile(member)
            else:
                member.size = 1
                tar.addfile(member, io.BytesIO(b"%d" % number))
    entries = all_entries(source("webdataset", path))
    return [(entry.key, content(entry.image), content(entry.caption), entry.fault) for entry in entries]


TWICE = "two members of the shard have one name"
APART = "its parts are not together in the shard, which has more than one of its key"
LINK = "a member is a link to what the shard does not hold before it"
DOTS = "neither an image nor a caption under its key, which ends at the first dot of a member's name"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        # Hidden files and those without a suffix part no sample, wherever they stand.
        (["./._0.jpg", "./0.jpg", "./._0.txt", "LICENSE", ".DS_Store", "./0.txt"], [("0", b"1", b"5", None)]),
        (["__MACOSX/0.jpg", ".git/1.jpg", "a/0.jpg", "a/Thumbs.db", "a/0.txt"], [("a/0", b"2", b"4", None)]),
        # A key twice: nobody knows which is meant.
        (["0.jpg", "0.txt", "0.jpg", "0.txt"], [("0", b"0", b"3", TWICE)]),
        (["0.jpg", "0.JPG", "0.txt"], [("0", b"0", b"2", TWICE)]),
        # Whole samples of two shards that were put together stay samples.
        (
            ["0.jpg", "0.txt", "1.jpg", "1.txt", "0.jpg", "0.txt"],
            [("0", b"0", b"1", None), ("1", b"2", b"3", None), ("0", b"4", b"5", None)],
        ),
        # Members out of order are put together, where there is one way to.
        (["0.jpg", "1.jpg", "1.txt", "0.txt"], [("0", b"0", b"3", None), ("1", b"1", b"2", None)]),
        (["0.jpg", "0.txt", "1.jpg", "0.txt", "1.txt"], [("0", b"0", b"1", APART), ("1", b"2", b"4", None)]),
        # Of several images the first.
        (["0.jpg", "0.png", "0.txt"], [("0", b"0", b"2", None)]),
        # Names as tar programs write them.
        (["/abs/0.jpg", "/abs/0.txt"], [("abs/0", b"0", b"1", None)]),
        (["../0.jpg", "../0.txt"], [("../0", b"0", b"1", None)]),
        (["a.b.jpg", "a.b.txt"], [("a", None, None, DOTS)]),
        (["v1.5/0.jpg", "v1.5/0.txt"], [("v1.5/0", b"0", b"1", None)]),
        # Links within the shard are what they lead to; others, and devices, are told.
        (["0.jpg", ("0.txt", tarfile.LNKTYPE, "0.jpg")], [("0", b"0", b"0", None)]),
        (["a/0.jpg", ("a/0.txt", tarfile.SYMTYPE, "./0.jpg")], [("a/0", b"0", b"0", None)]),
        (["0.jpg", ("0.txt", tarfile.SYMTYPE, "/etc/passwd")], [("0", b"0", None, LINK)]),
        ([("0.jpg", tarfile.CHRTYPE, ""), "0.txt"], [("0", None, b"1", "a member is no regular file")]),
    ],
)  # fmt: skip
def test_members_as_they_are_found(tmp_path: Path, names: list[Any], found: list[Any]) -> None:
    assert listed(tmp_path / "a.tar", names) == found
    assert count_samples(DataSettings(sources=(SourceSettings(kind="webdataset", path=f"{tmp_path}/*.tar"),))) == sum(
        fault is None and image is not None for _, image, _, fault in found
    )


def test_what_follows_the_end_of_a_shard_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(2 * made_shard(tmp_path))
    unit = source("webdataset", tmp_path / "a.tar").unit(0)
    assert len(unit.entries) == 5
    assert unit.fault is not None
    assert unit.fault.startswith("more follows the end of the shard")


def test_a_shard_that_went_away_is_a_fault(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", FILES)
    opened = source("webdataset", shard)
    shard.unlink()
    assert opened.unit(0).fault == "the shard cannot be read (No such file or directory)"


# ---- tables ----

ROWS = [(f"pictures/{n}.jpg", f'caption {n}, "quoted"\nin two lines') for n in range(ROWS_PER_UNIT + 3)]


def write_table(path: Path, rows: list[tuple[str, str]], names: tuple[str, str] = ("image", "caption")) -> Path:
    if path.suffix == ".parquet":
        columns = {"extra": range(len(rows)), names[1]: [row[1] for row in rows], names[0]: [row[0] for row in rows]}
        pyarrow.parquet.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
        return path
    mark = "\t" if path.suffix == ".tsv" else ","
    lines = [mark.join(("extra", *names[::-1]))]
    if path.suffix == ".tsv":
        lines += [mark.join((str(n), row[1], row[0])) for n, row in enumerate(rows)]
    elif path.suffix == ".jsonl":
        lines = [json.dumps({"extra": n, names[1]: row[1], names[0]: row[0]}) for n, row in enumerate(rows)]
    else:
        lines += [mark.join((str(n), '"' + row[1].replace('"', '""') + '"', row[0])) for n, row in enumerate(rows)]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    # Rows of a TSV are lines.
    rows = [(name, text.replace("\n", " ")) for name, text in ROWS] if suffix == "tsv" else ROWS
    table = write_table(tmp_path / f"a.{suffix}", rows)
    opened = source("table", table)
    assert len(opened) == 2
    found = [(entry.key, entry.image, entry.caption) for entry in all_entries(opened)]
    assert found == [(name, ByteRange(f"{tmp_path}/{name}"), caption.encode()) for name, caption in rows]
    elsewhere = all_entries(source("table", table, root="/data"))[0].image
    assert elsewhere == ByteRange("/data/pictures/0.jpg")


def test_several_tables_with_other_columns(tmp_path: Path) -> None:
    for number in (0, 1):
        write_table(tmp_path / f"{number}.csv", [(f"/absolute/{number}.jpg", str(number))], ("filepath", "title"))
    opened = source("table", tmp_path / "{0..1}.csv", image_column="filepath", caption_column="title")
    assert [(entry.image, entry.caption) for entry in all_entries(opened)] == [
        (ByteRange("/absolute/0.jpg"), b"0"),
        (ByteRange("/absolute/1.jpg"), b"1"),
    ]
    with pytest.raises(InputError, match="has no column 'image', it has 'extra', 'title', 'filepath'"):
        source("table", tmp_path / "0.csv")


def test_rows_that_are_empty_or_not_text_spoil_no_others(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"image,caption\n1.jpg,caf\xe9\n,no picture\n3.jpg,\n4.jpg,four\n")
    rows = [(entry.image, entry.caption) for entry in all_entries(source("table", tmp_path / "a.csv"))]
    assert rows == [
        (ByteRange(f"{tmp_path}/1.jpg"), b"caf\xe9"),
        (None, b"no picture"),
        (ByteRange(f"{tmp_path}/3.jpg"), b""),
        (ByteRange(f"{tmp_path}/4.jpg"), b"four"),
    ]
    pyarrow.parquet.write_table(pa.table({"image": ["1.jpg", None], "caption": [None, "two"]}), tmp_path / "a.parquet")
    rows = [(entry.image, entry.caption) for entry in all_entries(source("table", tmp_path / "a.parquet"))]
    assert rows == [(ByteRange(f"{tmp_path}/1.jpg"), None), (None, b"two")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "has no column 'image'"),
        ("a.csv", b"image,caption\n", "there are no rows in"),
        ("a.csv", b'image,caption\n1,2\n2,"open\n3,"x"\n', "a.csv cannot be read: line 4: ',' expected after '\"'"),
        ("a.csv", b'image,caption\n1,"open\n3,x\n', "a.csv cannot be read: line 3: unexpected end of data"),
        ("a.csv", b"image,caption,caption\n1,2,3\n", "a.csv has 2 columns 'caption': rename all but one"),
        ("a.tsv", b"image,caption\n1,2\n", "a.tsv has no column 'image', it has 'image,caption'"),
        ("a.jsonl", b'{"file": "a"}\n', "a.jsonl has no column 'image', it has 'file'"),
        ("a.parquet", b"PAR1nonsense", "the table .*a.parquet cannot be read"),
        ("a.xlsx", b"PK", "a table must be a .csv, .tsv, .jsonl, .ndjson or .parquet file"),
    ],
)
def test_bad_tables(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        source("table", tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        (
            "a.tsv",
            'image\tcaption\n1\t"Stay weird" poster\n2\tthe 5" disk\n3\t"open\n',
            ['"Stay weird" poster', 'the 5" disk', '"open'],
        ),
        ("a.tsv", "\ufeffimage\tcaption\r\n\r\n1\ta, b\r\n2\tc\t\r\n", ["a, b", "c"]),
        ("a.csv", "\r\nimage,caption\r\n1,\"a\r\nb\"\r\n\r\n2,\"\"\"c\"\" d\",,\r\n", ["a\r\nb", '"c" d']),
        ("a.csv", " Image ;Caption\n1;a, b\n2;c\n", ["a, b", "c"]),
        ("a.csv", "caption\timage\na, b\t1\nc\t 2 \n", ["a, b", "c"]),
        ("a.ndjson", '\n{"image": "1", "caption": "\\"a"}\r\n{"caption": "c", "image": "2", "x": [1]}', ['"a', "c"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_rows_are_what_the_format_says(tmp_path: Path, name: str, text: str, rows: list[str], encoding: str) -> None:
    if encoding == "utf-16" and not name.endswith(("csv", "tsv")):
        return
    (tmp_path / name).write_bytes(text.lstrip("\ufeff").encode(encoding) if encoding == "utf-16" else text.encode())
    entries = all_entries(source("table", tmp_path / name))
    assert [(Path(entry.key).name, entry.caption, entry.fault) for entry in entries] == [
        (str(number), row.encode(), None) for number, row in enumerate(rows, 1)
    ]


def test_rows_that_cannot_be_used_are_told_with_their_line(tmp_path: Path) -> None:
    many, few = ("the row has more fields than the table has columns", "the row has too few fields")
    (tmp_path / "a.csv").write_text('image,caption\n1,"a\nb"\n2,c,d\n3\n4,e\n')
    entries = all_entries(source("table", tmp_path / "a.csv"))
    assert [(entry.key, entry.fault) for entry in entries] == [
        ("1", None),
        ("line 4", many),
        ("line 5", few),
        ("4", None),
    ]
    (tmp_path / "a.jsonl").write_text(
        '{"image": "1", "caption": "a"}\n[1]\n{"image": 2, "caption": "b"}\n{"image": "3"}\n{"im'
    )
    entries = all_entries(source("table", tmp_path / "a.jsonl"))
    no_object = "the line is not a JSON object of texts"
    assert [(entry.key, entry.caption, entry.fault) for entry in entries] == [
        ("1", b"a", None), ("line 2", None, no_object), ("line 3", None, no_object), ("3", None, None),
        ("line 5", None, no_object),
    ]  # fmt: skip


def test_columns_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "split=train" / "a.parquet"  # a folder's name is no column
    path.parent.mkdir()
    coded = pa.array(["a", "b", "a"]).dictionary_encode()
    pyarrow.parquet.write_table(
        pa.table({"Image": pa.array(["1", "2", "3"], pa.string_view()), "caption": coded}), path
    )
    assert [entry.caption for entry in all_entries(source("table", path))] == [b"a", b"b", b"a"]
    pyarrow.parquet.write_table(pa.table({"image": ["1"], "caption": [["a", "b"]]}), path)
    with pytest.raises(InputError, match=r"the column 'caption' is of type list<.*>, expected texts"):
        source("table", path)


# ---- folders ----


def test_folders_as_they_lie_on_disks(tmp_path: Path) -> None:
    for name in (
        "a.jpg",
        "a.TXT",
        "._a.jpg",
        "._a.txt",
        ".ipynb_checkpoints/a.jpg",
        "__MACOSX/a.jpg",
        "sub/b c.jpg",
        "sub/b c.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("again", "and again"):  # each way round would double the ways
        (tmp_path / "sub" / name).symlink_to(tmp_path, target_is_directory=True)
    entries = all_entries(source("folder", tmp_path))
    assert contents(entries) == [("a.jpg", b"a.jpg", b"a.TXT"), ("sub/b c.jpg", b"sub/b c.jpg", b"sub/b c.txt")]
    for name in ("x.tar", "._x.tar", "Thumbs.db"):
        (tmp_path / name).touch()
    assert [Path(name).name for name in expand_files(f"{tmp_path}/**/*[rb]", "shards")] == ["x.tar"]


def test_folders(tmp_path: Path) -> None:
    for name, text in {"b.png": "", "b.txt": "bee", "a.JPG": "", "sub/c.v2.webp": "", "sub/c.v2.txt": "sea"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert contents(all_entries(source("folder", tmp_path))) == [
        ("a.JPG", b"", None),
        ("b.png", b"", b"bee"),
        ("sub/c.v2.webp", b"", b"sea"),
    ]


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images in the folder"):
        source("folder", tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        source("folder", tmp_path / "nowhere")


# ---- settings ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "zip"}, "kind of a data source must be one of webdataset, table, folder, got 'zip'"),
        ({"path": ""}, "needs a path"),
        ({"weight": 0.0}, "weight of a.tar must be greater than 0"),
        ({"weight": np.nan}, "weight of a.tar must be greater than 0"),
        ({"caption_suffix": ".txt"}, "without a dot"),
    ],
)
def test_bad_source_settings(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SourceSettings(**{"kind": "webdataset", "path": "a.tar"} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "there are no data sources"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"prompts": -1}, "prompts must not be negative"),
        ({"erasing": 1.5}, "erasing must lie between 0 and 1"),
        ({"crop_scale": (0.5, 0.1)}, "the smaller one first"),
        ({"rand_augment_magnitude": 11}, "between 0 and 10"),
        ({"interpolation": "nearest"}, "one of bilinear, bicubic"),
        ({"templates": "ninety"}, "unknown template set"),
    ],
)
def test_bad_data_settings(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataSettings(**{"sources": (SourceSettings(kind="folder", path="x"),)} | change)
