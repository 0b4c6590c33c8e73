"""Files as they lie on disks: one reader of texts and JSON, one rule for hidden files."""

import json
import os
from pathlib import Path

import pytest

from groupvit_common.errors import CheckpointError
from groupvit_common.storage.json_text import parse_json, read_json
from groupvit_common.storage.names import is_hidden
from groupvit_common.storage.reading import TEXT_BYTES, read_bytes, read_text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"a": ' + "9" * 5000 + "}", "40 digits or more"),
        ('{"a": -1' + "0" * 400 + "}", "40 digits or more"),
        ('{"a": ' + "[" * 65 + "]" * 65 + "}", "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        (r'{"a": "\ud800"}', "half of a surrogate pair"),
        (r'{"\uDFFF": 1}', "half of a surrogate pair"),
        (b'{"a": "\xff"}', "cannot be read as JSON"),
        ("[1]", "must hold a JSON object, found an array"),
        ("null", "found null"),
        ("", "cannot be read as JSON"),
    ],
)
def test_json_that_nobody_can_use_is_refused_naming_the_file(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_as_other_programs_write_it_is_read(tmp_path: Path) -> None:
    # "No bound" in transformers' tokenizers, an emoji as a pair of surrogates, a byte order mark.
    content = {
        "model_max_length": int(1e30),
        "emoji": "\N{GRINNING FACE}",
        "deep": [[[[[[1.5e300]]]]]],
        "digits": "7" * 50,
    }
    path = tmp_path / "tokenizer_config.json"
    path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    assert read_json(path) == content
    assert parse_json(json.dumps(content, ensure_ascii=False), "here") == content


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    link, pipe, large = tmp_path / "link", tmp_path / "pipe", tmp_path / "large"
    link.symlink_to("/dev/zero")
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(TEXT_BYTES + 1)
    for path, message in (
        (link, "device or a pipe"),
        (pipe, "device or a pipe"),
        (large, "larger than 64 MiB"),
        (tmp_path, "is a directory"),
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / ("n" * 300), "cannot be read"),
        (tmp_path / "a\x00b", "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_bytes(path)


def test_text_is_utf8_whatever_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffKatze\r\nHündin\rMaus\n".encode())
    assert read_text(path) == "Katze\nHündin\nMaus\n"
    path.write_bytes("Hündin".encode("latin-1"))
    with pytest.raises(CheckpointError, match="not UTF-8 text: byte 0xfc at 1"):
        read_text(path)


@pytest.mark.parametrize(
    "name", [".DS_Store", "._photo.jpg", ".ipynb_checkpoints", "__MACOSX", "Thumbs.db", "DESKTOP.INI"]
)
def test_what_programs_leave_is_hidden(name: str) -> None:
    assert is_hidden(name)


@pytest.mark.parametrize("name", ["photo.jpg", "a.b.jpg", "_photo.jpg", "thumbs.jpg", "__init__"])
def test_what_users_put_there_is_not_hidden(name: str) -> None:
    assert not is_hidden(name)
