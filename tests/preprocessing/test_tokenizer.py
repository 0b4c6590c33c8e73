"""Ids against transformers' fast CLIP tokenizer (reference/tokenizer: CLIP's vocabulary and a small one, the latter
with files), against a second implementation of byte-pair encoding, and the files, errors and training of the
tokenizer."""

import copy
import json
import os
import pickle
import shutil
import sys
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.preprocessing.encoding import BatchEncoding
from groupvit_common.preprocessing.tokenizer import AutoTokenizer, CLIPTokenizerFast
from tests.support import paths

REFERENCE = paths.REFERENCE / "tokenizer"
SMALL = REFERENCE / "small"
VOCABULARY = (SMALL / "vocab.json", SMALL / "merges.txt")
ODD = json.loads((REFERENCE / "odd_ids.json").read_text(encoding="utf-8"))
CLIP_IDS = json.loads((REFERENCE / "clip_ids.json").read_text(encoding="utf-8"))
CLIP_VOCABULARY = os.environ.get("GROUPVIT_CLIP_TOKENIZER")
needs_clip = pytest.mark.skipif(
    not CLIP_VOCABULARY, reason="GROUPVIT_CLIP_TOKENIZER names no directory with CLIP's vocabulary"
)

COLOURS, SHAPES, GROUNDS = (
    ("red", "green", "blue", "yellow"),
    ("circle", "square", "triangle", "star"),
    ("wet", "dry", "striped"),
)
CAPTIONS = [f"a {c} {s} on {g} grass, near the café" for c in COLOURS for s in SHAPES for g in GROUNDS]


@pytest.fixture(scope="module")
def small() -> CLIPTokenizerFast:
    return CLIPTokenizerFast(SMALL / "vocab.json", SMALL / "merges.txt")


@pytest.fixture(scope="module")
def clip() -> CLIPTokenizerFast:
    return CLIPTokenizerFast.from_pretrained(CLIP_VOCABULARY)


def check_odd(tokenizer, cases):
    for case in cases:
        ids = tokenizer(case["text"])["input_ids"]
        assert ids == case["ids"], case["text"]
        cut = tokenizer(case["text"], truncation=True, padding="max_length", max_length=9)
        assert (cut.input_ids, cut.attention_mask) == (case["cut"], case["mask"]), case["text"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == case["decoded"]
        assert tokenizer.decode(ids, True, clean_up_tokenization_spaces=False) == case["words"]
        assert tokenizer.decode(ids, True, clean_up_tokenization_spaces=True) == case["clean"]


# -- ids --


def test_odd_strings_with_a_small_vocabulary(small):
    check_odd(small, ODD["small"])


@needs_clip
def test_odd_strings_with_clips_vocabulary():
    # The reference tokenizer was made from these two files: tokenizer.json treats "<|ENDOFTEXT|>" in upper case
    # differently.
    directory = Path(CLIP_VOCABULARY)
    check_odd(CLIPTokenizerFast(directory / "vocab.json", directory / "merges.txt"), ODD["clip"])


@needs_clip
def test_clip_ids(clip):
    texts = [case["text"] for case in CLIP_IDS]
    assert clip(texts).input_ids == [case["ids"] for case in CLIP_IDS]
    padded = clip(texts, padding="max_length", truncation=True, max_length=77)
    assert padded.input_ids == [case["ids_77"] for case in CLIP_IDS]
    assert padded.attention_mask == [case["mask_77"] for case in CLIP_IDS]
    assert clip.batch_decode([case["ids"] for case in CLIP_IDS], skip_special_tokens=True) == [
        case["decoded"] for case in CLIP_IDS
    ]


@needs_clip
def test_clip_vocabulary(clip):
    assert (len(clip), clip.vocab_size, clip.model_max_length, clip.padding_side) == (49408, 49408, 77, "right")
    assert (clip.bos_token_id, clip.eos_token_id, clip.unk_token_id, clip.pad_token_id) == (49406, 49407, 49407, 49407)
    # The layout that `train` follows: bytes by code point, then bytes that end a word, merges, special tokens.
    tokens = clip.convert_ids_to_tokens(range(512))
    assert tokens[:256] == sorted(tokens[:256])
    assert tokens[256:] == [token + "</w>" for token in tokens[:256]]


def encode_plainly(text: str, vocab: dict[str, int], merges: list[tuple[str, str]]) -> list[int]:
    """Byte-pair encoding from its description, without the `tokenizers` library; for text without apostrophes or
    `<|`."""

    def kind(character: str) -> str:
        if character.isspace():
            return "space"
        category = unicodedata.category(character)[0]
        return category if category in "LN" else "other"

    words: list[str] = []
    previous = "space"
    for character in unicodedata.normalize("NFC", text).lower():
        now = kind(character)
        if now != "space":
            if now == previous and now != "N":
                words[-1] += character
            else:
                words.append(character)
        previous = now
    letters = sorted(token for token in vocab if len(token) == 1)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_letter = dict(zip(printable + [b for b in range(256) if b not in printable], letters, strict=True))
    rank = {pair: index for index, pair in enumerate(merges)}
    ids = []
    for word in words:
        parts = [byte_letter[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while True:
            pairs = [(rank.get(pair, len(rank)), place) for place, pair in enumerate(pairwise(parts))]
            if not pairs or min(pairs)[0] == len(rank):
                break
            pair = merges[min(pairs)[0]]
            merged, place = [], 0
            while place < len(parts):
                step = 2 if tuple(parts[place : place + 2]) == pair else 1
                merged.append("".join(parts[place : place + step]))
                place += step
            parts = merged
        ids += [vocab[part] for part in parts]
    return ids


@cache
def small_files() -> tuple[dict[str, int], list[tuple[str, ...]]]:
    merges = (SMALL / "merges.txt").read_text().split("\n")[1:]
    return json.loads((SMALL / "vocab.json").read_text()), [tuple(line.split(" ")) for line in merges if line]


@cache
def small_tokenizer(side: str = "right") -> CLIPTokenizerFast:
    return CLIPTokenizerFast(SMALL / "vocab.json", SMALL / "merges.txt", padding_side=side)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("redgnstarcl éÉ本ß12.,!-_()😀\u00a0\t"), max_size=30))
def test_ids_equal_a_second_implementation(text):
    vocab, merges = small_files()
    expected = [vocab["<|startoftext|>"], *encode_plainly(text, vocab, merges), vocab["<|endoftext|>"]]
    assert small_tokenizer()(text).input_ids == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=4), st.integers(2, 12), st.sampled_from(["right", "left"]))
def test_padding_and_truncation_only_shape_the_ids(texts, length, side):
    tokenizer = small_tokenizer(side)
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(texts), length)
    for text, row, mask in zip(texts, batch.input_ids, batch.attention_mask, strict=True):
        whole = tokenizer(text).input_ids
        kept = row[mask == 1].tolist()
        # Whatever is cut, the end token stays last.
        assert kept == (whole if len(whole) <= length else [*whole[: length - 1], tokenizer.eos_token_id])
        assert (row[mask == 0] == tokenizer.pad_token_id).all()
        assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right")


# -- the call --


def test_single_text_and_batch(small):
    one = small("a red star")
    assert one.input_ids[0] == small.bos_token_id
    assert one.input_ids[-1] == small.eos_token_id
    assert small(["a red star"]).input_ids == [one.input_ids]
    assert small.encode("a red star", add_special_tokens=False) == one.input_ids[1:-1]
    assert small.encode(["a", "red star"]) == small(["a", "red star"]).input_ids
    assert small.convert_tokens_to_ids(small.tokenize("a red star")) == one.input_ids[1:-1]
    assert small("", add_special_tokens=False).input_ids == []
    assert "attention_mask" not in small("a", return_attention_mask=False)


def test_padding_to_the_longest_or_to_a_length(small):
    texts = ["a", "a red star"]
    longest = small(texts, padding=True)
    assert longest == small(texts, padding="longest")
    assert len({len(row) for row in longest.input_ids}) == 1
    assert sum(longest.attention_mask[0]) == 3
    assert len(small("a", padding="max_length").input_ids) == 77
    assert len(small("a", padding="max_length", max_length=5).input_ids) == 5
    assert small("a", padding="max_length", max_length=5, padding_side="left").attention_mask == [0, 0, 1, 1, 1]


def test_truncation(small):
    text = "star " * 100
    assert len(small(text).input_ids) == 102  # as it is: the model says what it can take
    assert len(small(text, truncation=True).input_ids) == 77
    assert len(small(text, max_length=10).input_ids) == 10  # as transformers: a length without padding cuts
    assert len(small(text, max_length=10, truncation=False).input_ids) == 102
    assert len(small(text, max_length=10, padding="max_length").input_ids) == 102
    assert len(small(text, max_length=10, truncation=True, add_special_tokens=False).input_ids) == 10
    left = CLIPTokenizerFast(SMALL / "vocab.json", SMALL / "merges.txt", truncation_side="left")
    ids = left("red star", max_length=3).input_ids
    assert ids == [left.bos_token_id, left("star").input_ids[-2], left.eos_token_id]


def test_tensors(small):
    arrays = small(["a", "a star"], padding=True, return_tensors="np")
    assert arrays.input_ids.dtype == arrays.attention_mask.dtype == np.int64
    tensors = small(["a", "a star"], padding=True, return_tensors="pt")
    assert tensors.input_ids.dtype == torch.int64
    np.testing.assert_array_equal(tensors.input_ids.numpy(), arrays.input_ids)
    assert small("a", return_tensors="pt").input_ids.shape == (1, 3)


def test_tensorflow_tensors(small):
    tf = pytest.importorskip("tensorflow", exc_type=ImportError)
    ids = small(["a", "a star"], padding=True, return_tensors="tf").input_ids
    assert ids.dtype == tf.int32
    np.testing.assert_array_equal(ids.numpy(), small(["a", "a star"], padding=True).input_ids)


def test_a_missing_framework_is_named(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(InputError, match=r"needs tensorflow.*groupvit\[tf\]"):
        small("a", return_tensors="tf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "got NoneType"),
        (3, "got int"),
        (b"a cat", "decode bytes first"),
        ([["a", "cat", "mat"]], "text 0 of the list must be a string, got list"),
        (["a", None], "text 1 of the list must be a string, got NoneType"),
        ([], "list of texts is empty"),
        (np.zeros((4, 4, 3)), "images are passed as images="),
        ("a \ud800 b", "lone surrogates"),
    ],
)
def test_bad_text(small, text, message):
    with pytest.raises(InputError, match=message):
        small(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"return_tensors": "jax"}, "return_tensors must be None, 'np', 'pt' or 'tf', got 'jax'"),
        (
            {"padding": "longer"},
            "padding must be one of True, False, 'do_not_pad', 'longest', 'max_length', got 'longer'",
        ),
        ({"padding": 5}, "padding must be one of"),
        ({"truncation": "only_third"}, "truncation must be one of"),
        ({"truncation": "only_second", "max_length": 3}, "needs a second text"),
        ({"max_length": 4, "stride": 2}, "stride=2 must be less than the 2 tokens"),
        ({"max_length": 7, "truncation": True, "padding": True, "pad_to_multiple_of": 8}, "a multiple of 8"),
        ({"colour": 1}, "'colour' is not a keyword of the tokenizer's call"),
        ({"max_length": 1, "truncation": True}, "at least 2 tokens, got 1"),
        ({"max_length": "77"}, "max_length must be an integer"),
        ({"padding": True, "padding_side": "both"}, "padding_side must be 'right' or 'left'"),
        ({"return_tensors": "pt"}, "texts of 3 to 5 tokens cannot share one tensor; pass padding=True"),
    ],
)
def test_bad_arguments(small, arguments, message):
    with pytest.raises(InputError, match=message):
        small(["a", "a red star"], **arguments)


def test_without_a_limit_nothing_is_cut_and_a_warning_says_so():
    # What transformers writes for "no limit".
    tokenizer = CLIPTokenizerFast(SMALL / "vocab.json", SMALL / "merges.txt", model_max_length=int(1e30))
    with pytest.warns(UserWarning, match="sets no limit"):
        assert len(tokenizer("star " * 100, truncation=True).input_ids) == 102
    with pytest.warns(UserWarning, match="sets no limit"):
        assert len(tokenizer("star", padding="max_length").input_ids) == 3


def test_no_padding_token(small):
    tokenizer = CLIPTokenizerFast(SMALL / "vocab.json", SMALL / "merges.txt", pad_token=None)
    assert tokenizer.pad_token_id is None
    with pytest.raises(InputError, match="no padding token"):
        tokenizer(["a", "a star"], padding=True)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer(["a", "a star"], padding=True) == small(["a", "a star"], padding=True)


# -- ids back to text --


def test_decode_takes_ids_of_any_kind(small):
    ids = small("a red star on grass").input_ids
    for kind in (list, tuple, np.asarray, torch.tensor):
        assert small.decode(kind(ids), skip_special_tokens=True) == "a red star on grass"
    assert small.batch_decode(torch.tensor([ids, ids]), skip_special_tokens=True) == ["a red star on grass"] * 2
    assert small.decode([ids, ids], True) == small.decode(torch.tensor([ids, ids]), True) == ["a red star on grass"] * 2
    assert small.decode(small("a star"), True) == "a star"
    assert small.decode(ids[1]) == "a"
    assert small.convert_ids_to_tokens(ids, skip_special_tokens=True) == small.tokenize("a red star on grass")
    assert small.convert_ids_to_tokens(int(small.eos_token_id)) == "<|endoftext|>"
    assert small.convert_tokens_to_ids("no such token") == small.unk_token_id


@pytest.mark.parametrize(
    ("ids", "message"), [([1.5], "integers"), ([-1], "-1 is not the id"), ([[1], [-2]], "-2 is not the id")]
)
def test_bad_ids(small, ids, message):
    with pytest.raises(InputError, match=message):
        small.decode(ids)


def test_unknown_id_has_no_token(small):
    with pytest.raises(InputError, match=r"99999 is not the id of a token; this vocabulary has 560 tokens"):
        small.convert_ids_to_tokens([99999])


# -- files --


def test_saved_files_give_the_same_tokenizer(small, tmp_path):
    small.padding_side, before = "left", small.padding_side
    try:
        paths = small.save_pretrained(tmp_path / "new" / "folder")
    finally:
        small.padding_side = before
    assert sorted(paths) == sorted(map(str, (tmp_path / "new" / "folder").iterdir()))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
    check_odd_texts = [case["text"] for case in ODD["small"]]
    assert loaded(check_odd_texts) == small(check_odd_texts)
    assert (loaded.padding_side, loaded.model_max_length, loaded.get_vocab()) == ("left", 77, small.get_vocab())
    # The vocabulary files alone are as good, and equal to those that were read.
    (tmp_path / "new" / "folder" / "tokenizer.json").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")(check_odd_texts) == small(check_odd_texts)
    assert json.loads(Path(paths[2]).read_text()) == json.loads((SMALL / "vocab.json").read_text())
    assert Path(paths[3]).read_text().split() == (SMALL / "merges.txt").read_text().split()


def test_saved_merges_are_strings(small, tmp_path):
    # tokenizers before 0.20, that is transformers before 4.45, cannot read lists.
    small.save_pretrained(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert merges[0] == (SMALL / "merges.txt").read_text().split("\n")[1]


def test_settings_of_the_files_are_honoured_and_kept(tmp_path):
    shutil.copytree(SMALL, tmp_path, dirs_exist_ok=True)
    config = {
        "model_max_length": 20,
        "pad_token": "<|endoftext|>",
        "errors": "replace",
        "clean_up_tokenization_spaces": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    # Where the map disagrees with the configuration about the padding token, transformers follows the map.
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!", "normalized": False}}))
    tokenizer = CLIPTokenizerFast.from_pretrained(tmp_path)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.model_max_length) == ("!", 0, 20)
    # As a special token it is found before words are cut: "!" alone, not "!</w>".
    assert tokenizer.tokenize("a star!") == ["a</w>", "star</w>", "!"]
    assert tokenizer(["a", "a star"], padding=True).input_ids[0][3:] == [0]
    assert tokenizer.decode(tokenizer("a , b").input_ids, True) == "a, b"
    tokenizer.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert (again["errors"], again["pad_token"], again["model_max_length"]) == ("replace", "!", 20)
    assert CLIPTokenizerFast.from_pretrained(tmp_path / "again").tokenize("a star!") == ["a</w>", "star</w>", "!"]
    assert CLIPTokenizerFast.from_pretrained(tmp_path, model_max_length=9).model_max_length == 9


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"modle_max_length": 5},
            r"'modle_max_length' is not a keyword of the tokenizer \(did you mean 'model_max_length'\?\); these are: ",
        ),
        ({"do_lower_case": False}, "do_lower_case=False is not supported: the tokenizer knows do_lower_case=True only"),
        ({"errors": "strict"}, "knows errors='replace' only"),
        ({"additional_special_tokens": "<x>"}, "additional_special_tokens must be a list"),
    ],
)
def test_keywords_that_mean_nothing_are_refused(keywords, message):
    for load in (CLIPTokenizerFast.from_pretrained, lambda _, **more: CLIPTokenizerFast(*VOCABULARY, **more)):
        with pytest.raises(InputError, match=message):
            load(SMALL, **keywords)


def test_the_former_name_of_a_token_is_accepted_where_the_hub_is_asked():
    tokenizer = CLIPTokenizerFast.from_pretrained(SMALL, use_auth_token="hf_SECRET")
    assert "hf_SECRET" not in repr(tokenizer.init_kwargs)
    with pytest.raises(InputError, match="pass token= instead") as refusal:
        CLIPTokenizerFast(*VOCABULARY, use_auth_token="hf_SECRET")
    assert "hf_SECRET" not in str(refusal.value)


def test_keywords_that_nobody_knows_are_warned_of_without_their_values(tmp_path):
    for name in ("api_key", "tokenizer_file"):
        with pytest.warns(UserWarning, match=f"'{name}' is not a keyword of the tokenizer and has no effect") as seen:
            tokenizer = CLIPTokenizerFast.from_pretrained(SMALL, **{name: "hf_SECRET"})
        assert "hf_SECRET" not in str(seen[0].message)
        assert not any("hf_SECRET" in text for text in tokenizer.file_texts().values())


def test_keywords_of_transformers_that_change_nothing_are_accepted_and_not_saved(small, tmp_path):
    shutil.copytree(SMALL, tmp_path / "files")
    (tmp_path / "files" / "tokenizer_config.json").write_text(
        json.dumps(
            {"kept": 1, "errors": "ignore", "do_lower_case": True, "token": "hf_SECRET", "use_auth_token": "hf_X"}
        )
    )
    harmless = {
        "use_fast": False, "trust_remote_code": True, "resume_download": True, "proxies": None, "add_bos_token": True,
        "add_eos_token": True, "add_prefix_space": False, "additional_special_tokens": [], "errors": "replace",
        "from_slow": False, "split_special_tokens": False, "verbose": False, "clean_up_tokenization_spaces": True,
    }  # fmt: skip
    where = {"token": "hf_SECRET", "force_download": True, "local_files_only": True, "revision": "main"}
    tokenizer = CLIPTokenizerFast.from_pretrained(tmp_path / "files", **harmless, **where)
    assert tokenizer.extra == {"kept": 1, "do_lower_case": True}
    assert tokenizer("a red star") == CLIPTokenizerFast(*VOCABULARY, **harmless)("a red star") == small("a red star")
    paths = tokenizer.save_pretrained(tmp_path / "saved")
    assert not any("hf_" in Path(path).read_text(encoding="utf-8") for path in paths)
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["clean_up_tokenization_spaces"]
    assert config["kept"] == 1
    assert not (harmless | where).keys() & config.keys() - {"clean_up_tokenization_spaces"}


def test_force_download_reaches_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "groupvit_common.preprocessing.tokenizer.resolve", lambda *_, location, **__: asked.append(location) or SMALL
    )
    CLIPTokenizerFast.from_pretrained("org/name", force_download=True, revision="v1")
    CLIPTokenizerFast.from_pretrained("org/name")
    assert [(location.force_download, location.revision) for location in asked] == [(True, "v1"), (False, None)]


def test_truncation_and_padding_inside_a_tokenizer_file_are_not_obeyed(small, tmp_path):
    # transformers, too, decides both call by call; some published files carry what their last call used.
    small.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert CLIPTokenizerFast.from_pretrained(tmp_path)("a red star on grass") == small("a red star on grass")


def test_a_tokenizer_file_of_before_4_17_is_rebuilt(small, tmp_path):
    small.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    texts = ["a red star, on grass", "star!!star 12"]
    assert CLIPTokenizerFast.from_pretrained(tmp_path)(texts) == small(texts)


def test_subfolder(tmp_path):
    shutil.copytree(SMALL, tmp_path / "tokenizer")
    assert len(CLIPTokenizerFast.from_pretrained(tmp_path, subfolder="tokenizer")) == 560


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read as JSON"),
        ("tokenizer.json", '{"model": {"type": "WordPiece"}}', "tokenizer.json holds a 'WordPiece' tokenizer"),
        ("tokenizer.json", "[]", "tokenizer.json must hold a JSON object"),
        ("vocab.json", "not json", "vocab.json cannot be read as JSON"),
        ("vocab.json", "[1]", "vocab.json must hold a JSON object"),
        ("vocab.json", '{"a": 0}', "vocab.json with .*merges.txt cannot be used as a tokenizer"),
        ("merges.txt", "#version: 0.2\nonly-one\n", "merges.txt must hold two tokens a line, found 'only-one'"),
        ("tokenizer_config.json", "{'a': 1}", "tokenizer_config.json cannot be read"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json must hold a JSON object"),
    ],
)
def test_a_broken_file_is_named(tmp_path, file, content, named):
    shutil.copytree(SMALL, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=named):
        CLIPTokenizerFast.from_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path):
    shutil.copy(SMALL / "vocab.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor merges\.txt"):
        CLIPTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"merges\.txt does not exist"):
        CLIPTokenizerFast(tmp_path / "vocab.json", tmp_path / "merges.txt")
    with pytest.raises(InputError, match="needs vocab_file and merges_file"):
        CLIPTokenizerFast(tmp_path / "vocab.json")


@pytest.mark.parametrize(
    "bad", [{"model_max_length": 1}, {"padding_side": "up"}, {"bos_token": None}, {"eos_token": ""}, {"pad_token": 3}]
)
def test_bad_settings(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        CLIPTokenizerFast(SMALL / "vocab.json", SMALL / "merges.txt", **bad)


# -- training --


def test_training_gives_clips_layout_and_is_reproducible():
    tokenizer = CLIPTokenizerFast.train(CAPTIONS, 560, model_max_length=24)
    assert (len(tokenizer), tokenizer.vocab_size, tokenizer.model_max_length) == (560, 560, 24)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (558, 559, 559)
    # The committed small vocabulary was trained on the same captions.
    assert tokenizer.get_vocab() == json.loads((SMALL / "vocab.json").read_text())
    assert CLIPTokenizerFast.train(reversed(CAPTIONS), 560).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("text", [case["text"] for case in ODD["small"]])
def test_no_text_is_unknown_to_a_trained_vocabulary(text):
    tokenizer = CLIPTokenizerFast.train(["a"], 514)
    plain = text.lower().replace("<|", "")
    # The unknown token is the end token: it must occur once, at the end, or pooling would find it too early.
    assert tokenizer(plain).input_ids.index(tokenizer.eos_token_id) == len(tokenizer(plain).input_ids) - 1


def test_few_captions_give_a_smaller_vocabulary():
    tokenizer = CLIPTokenizerFast.train(["red star"], 2000)
    assert len(tokenizer) < 530
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.tokenize("Red STAR") == ["red</w>", "star</w>"]


def test_bad_training():
    with pytest.raises(InputError, match="vocab_size must be at least 514"):
        CLIPTokenizerFast.train(CAPTIONS, 100)
    with pytest.raises(InputError, match="empty list of captions"):
        CLIPTokenizerFast.train([], 600)
    with pytest.raises(InputError, match="got NoneType"):
        CLIPTokenizerFast.train(["a", None], 600)


# -- BatchEncoding --


def test_batch_encoding_is_a_dictionary_with_attributes():
    encoding = BatchEncoding(input_ids=[1], attention_mask=[1])
    encoding.pixel_values = 3
    assert dict(**encoding) == {"input_ids": [1], "attention_mask": [1], "pixel_values": 3}
    with pytest.raises(
        AttributeError, match="no 'labels' in this encoding; it holds input_ids, attention_mask, pixel_values"
    ):
        _ = encoding.labels
    assert pickle.loads(pickle.dumps(encoding)) == copy.deepcopy(encoding) == encoding


def test_batch_encoding_moves_tensors():
    encoding = BatchEncoding(input_ids=torch.ones(1, 2, dtype=torch.int64), pixel_values=torch.ones(1, 2), name="x")
    assert encoding.to("cpu", torch.float16) is encoding
    assert (encoding.input_ids.dtype, encoding.pixel_values.dtype, encoding.name) == (torch.int64, torch.float16, "x")
    encoding.to(torch.device("meta"))
    assert encoding.input_ids.device.type == encoding.pixel_values.device.type == "meta"
    assert encoding.to(dtype=torch.bfloat16).pixel_values.dtype == torch.bfloat16
    assert encoding.input_ids.dtype == torch.int64
