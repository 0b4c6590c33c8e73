"""Calls of transformers' tokenizers: the answers of 4.49 (reference/tokenizer/calls.json), and what has none there."""

import collections.abc
import copy
import inspect
import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Encoding
from torch.utils.data import default_collate

from groupvit_common.compat.encoding import CharSpan, PaddingStrategy, TensorType, TokenSpan, TruncationStrategy
from groupvit_common.compat.tokenizer import PreTrainedTokenizerBase
from groupvit_common.errors import InputError
from groupvit_common.preprocessing.encoding import BatchEncoding
from groupvit_common.preprocessing.tokenizer import (
    AutoTokenizer,
    CLIPTokenizer,
    CLIPTokenizerFast,
    PreTrainedTokenizerFast,
)
from tests.support import paths

REFERENCE = paths.REFERENCE / "tokenizer"
VOCABULARY = (REFERENCE / "small" / "vocab.json", REFERENCE / "small" / "merges.txt")
CALLS = json.loads((REFERENCE / "calls.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small():
    return CLIPTokenizerFast(*VOCABULARY)


@pytest.fixture
def own():
    """A tokenizer to change."""
    return CLIPTokenizerFast(*VOCABULARY)


def plain(value):
    if isinstance(value, collections.abc.Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("call", CALLS["fast"], ids=lambda call: f"{call['method']}-{'-'.join(call['keywords'])}")
def test_calls_answer_as_transformers(small, call):
    result = getattr(small, call["method"])(*copy.deepcopy(call["arguments"]), **call["keywords"])
    assert plain(result) == call["result"]
    if "tokens" in call:
        rows = range(len(result.encodings))
        assert [result.tokens(row) for row in rows] == call["tokens"]
        assert [result.word_ids(row) for row in rows] == call["words"]
        assert [result.sequence_ids(row) for row in rows] == call["texts"]
        assert list(result) == list(call["result"])


# -- the slow tokenizer's clean-up --


@pytest.mark.parametrize("case", CALLS["slow"], ids=lambda case: ascii(case["text"]))
def test_the_slow_tokenizer_cleans_texts(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    tokenizer = CLIPTokenizer(*VOCABULARY)
    ids = tokenizer(case["text"]).input_ids
    assert ids == case["ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded"]


def test_the_slow_tokenizer_uses_ftfy_where_it_is_installed(small, monkeypatch):
    ftfy = types.ModuleType("ftfy")
    ftfy.fix_text = lambda text: text.replace("\u2019", "'")
    monkeypatch.setitem(sys.modules, "ftfy", ftfy)
    slow = CLIPTokenizer(*VOCABULARY)
    assert slow("it\u2019s").input_ids == small("it's").input_ids != small("it\u2019s").input_ids
    assert slow(["a", "it\u2019s"], ["b", "c"]).input_ids == small(["a", "it's"], ["b", "c"]).input_ids
    # ftfy keeps Chinese words together.
    assert slow("\u4e2d\u6587").input_ids == small("\u4e2d\u6587").input_ids


def test_which_tokenizer_cleans(tmp_path, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    slow = CLIPTokenizer(*VOCABULARY)
    assert (slow.is_fast, small.is_fast) == (False, True)
    text = "a\u4e2d\u200bb"
    assert slow(text).input_ids != small(text).input_ids
    slow.save_pretrained(tmp_path)
    # Files hold no clean-up: the class that loads them decides.
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads(small.file_texts()["tokenizer.json"])
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == small(text)
    assert AutoTokenizer.from_pretrained(tmp_path, use_fast=False)(text) == slow(text)
    assert CLIPTokenizer.from_pretrained(pretrained_model_name_or_path=tmp_path)(text) == slow(text)
    # Offsets are those of the text as it was given.
    assert slow(text).token_to_chars(1) == CharSpan(0, 1)
    assert slow(text, return_offsets_mapping=True)["offset_mapping"][-2] == (3, 4)


# -- keywords --


def test_tensors_and_enumerations(small):
    keywords = {"padding": PaddingStrategy.LONGEST, "truncation": TruncationStrategy.LONGEST_FIRST, "max_length": 8}
    batch = small(["a", "a red star"], return_tensors=TensorType.PYTORCH, return_offsets_mapping=True, **keywords)
    assert batch["offset_mapping"].shape == (*batch["input_ids"].shape, 2)
    arrays = small(["a", "a red star"], return_tensors="np", return_length=True, **keywords)
    np.testing.assert_array_equal(batch["input_ids"].numpy(), arrays["input_ids"])
    assert arrays["length"].tolist() == [5, 5]
    # Rows of different lengths are an array of arrays, as in transformers.
    ragged = small(["a", "a red star"], return_tensors="np").input_ids
    assert (ragged.dtype, [len(row) for row in ragged]) == (object, [3, 5])
    padded = small.pad([{"input_ids": torch.tensor([1])}, {"input_ids": torch.tensor([1, 2])}])
    assert padded["input_ids"].tolist() == [[1, small.pad_token_id], [1, 2]]
    assert isinstance(padded["attention_mask"], torch.Tensor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b"], ["c"]), "2 texts need as many second ones in text_pair, got 1"),
        ((["a"], "b"), "1 texts need as many second ones in text_pair, got str"),
        (("a", ["b"]), "text must be a string"),
        (([["a", "b", "c"]],), "text 0 of the list must be a string, got list"),
        (([("a", "b"), 3],), "got int"),
    ],
)
def test_bad_pairs(small, arguments, message):
    with pytest.raises(InputError, match=message):
        small(*arguments)


def test_words_are_needed_for_words(small):
    with pytest.raises(InputError, match="a text is a list of words"):
        small("a cat", is_split_into_words=True)
    with pytest.raises(InputError, match="a text is a list of words"):
        small([["a"], "cat"], is_split_into_words=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.pad([1]), "pad takes inputs or a list of inputs"),
        (lambda t: t.pad({"labels": [1]}), "inputs to pad need 'input_ids', got labels"),
        (lambda t: t.pad({"input_ids": [[1], [2]], "labels": [1]}), "must all have 2 rows"),
        (lambda t: t.prepare_for_model([1, 2], truncation="only_first", max_length=2), "cannot remove 2 tokens"),
        (lambda t: t.prepare_for_model([1], return_offsets_mapping=True), "no offsets"),
        (lambda t: t("a", "b c d", truncation="only_first", max_length=5), "cannot remove"),
        (lambda t: t.add_special_tokens({"colour": "x"}), "'colour' is no special token"),
        (lambda t: t.add_special_tokens({"additional_special_tokens": "x"}), "must be a list of tokens"),
        (lambda t: t.add_tokens([3]), "must be a string or an AddedToken"),
        (lambda t: setattr(t, "pad_token", 3), "pad_token must be a non-empty string"),
        (lambda t: t.get_special_tokens_mask([1], [2], already_has_special_tokens=True), "one list"),
        (lambda t: t.decode([1], use_source_tokenizer=True), "use_source_tokenizer=True is not supported"),
        (lambda t: t.save_pretrained("x", colour=1), "'colour' is not a keyword"),
    ],
)
def test_refusals(small, call, message):
    with pytest.raises(InputError, match=message):
        call(small)


def test_a_call_changes_no_shared_state(small):
    before = small.backend_tokenizer.to_str()
    small(["a", "a red star"], padding=True, truncation=True, max_length=4, return_overflowing_tokens=True)
    assert small("<|endoftext|>", split_special_tokens=True) != small("<|endoftext|>")
    assert small.backend_tokenizer.to_str() == before
    assert not small.backend_tokenizer.encode_special_tokens


# -- vocabulary and special tokens --


def test_vocabulary(small):
    assert small.vocab == small.get_vocab()
    assert small.encoder["star</w>"] == small.convert_tokens_to_ids("star</w>")
    slow = CLIPTokenizer(*VOCABULARY)
    assert slow.decoder[slow.encoder["star</w>"]] == "star</w>"
    assert slow.convert_tokens_to_string(["red</w>", "st", "ar</w>"]) == "red star"
    assert small.added_tokens_encoder == small.get_added_vocab() == {"<|startoftext|>": 558, "<|endoftext|>": 559}
    assert [token.content for token in small.added_tokens_decoder.values()] == ["<|startoftext|>", "<|endoftext|>"]
    assert (small.max_len_single_sentence, small.max_len_sentences_pair) == (75, 73)
    assert small.model_input_names == ["input_ids", "attention_mask"]


def test_special_tokens(own):
    assert own.special_tokens_map == {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    assert own.all_special_tokens == ["<|startoftext|>", "<|endoftext|>"]
    assert own.special_tokens_map_extended["bos_token"].special
    assert (own.sep_token, own.mask_token_id, own.additional_special_tokens, own.additional_special_tokens_ids) == (
        None, None, [], [],
    )  # fmt: skip
    own.pad_token_id = 0
    assert (own.pad_token, own.pad_token_id) == ("!", 0)
    assert own(["a", "a b"], padding=True).input_ids[0][-1] == 0
    own.cls_token = AddedToken("star</w>")
    assert own.cls_token_id == own.vocab["star</w>"]
    own.sep_token = "no such token"
    assert own.sep_token_id == own.unk_token_id


def test_added_tokens_are_found_saved_and_loaded(own, tmp_path):
    assert own.add_tokens(["<x>", "star</w>", AddedToken("<left>", lstrip=True)]) == 3
    assert own.add_tokens("<x>") == 0
    assert own.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<y>"]}) == 2
    assert own.add_special_tokens({"additional_special_tokens": ["<z>", "<y>"]}, False) == 1
    assert own.additional_special_tokens == ["<y>", "<z>"]
    assert (len(own), own.vocab_size, own.pad_token_id) == (565, 560, own.vocab["<pad>"])
    text = "a<x> red <left><y> <pad>"
    ids = own(text).input_ids
    assert [own.vocab[token] for token in ("<x>", "<left>", "<y>", "<pad>")] == [ids[2], *ids[4:7]]
    assert own.decode(ids, skip_special_tokens=True) == "a <x>red <left>"

    names = [path.rsplit("/", 1)[-1] for path in own.save_pretrained(str(tmp_path))]
    assert names == [
        "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json",
        "tokenizer.json",
    ]  # fmt: skip
    for left_out in ("README.md", "tokenizer.json", "tokenizer_config.json"):
        # Without tokenizer.json the tokens come from tokenizer_config.json, without that from added_tokens.json.
        (tmp_path / left_out).unlink(missing_ok=True)
        loaded = CLIPTokenizerFast.from_pretrained(tmp_path)
        assert loaded(text).input_ids == ids
        assert (loaded.vocab, loaded.special_tokens_map) == (own.vocab, own.special_tokens_map)
        assert loaded.decode(ids, skip_special_tokens=True) == "a <x>red <left>"


def test_files_of_transformers_5_name_additional_tokens_otherwise(own, tmp_path):
    own.add_special_tokens({"extra_special_tokens": ["<y>"]})
    own.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = config.pop("additional_special_tokens")
    del config["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").unlink()
    loaded = CLIPTokenizerFast.from_pretrained(tmp_path)
    assert loaded.additional_special_tokens == loaded.extra_special_tokens == ["<y>"]
    assert CLIPTokenizerFast.from_pretrained(tmp_path, extra_special_tokens=["<w>"]).all_special_ids == [558, 559, 561]


def test_keywords_of_save_pretrained(small, tmp_path, monkeypatch):
    def saved(**keywords):
        return [path.rsplit("/", 1)[-1] for path in small.save_pretrained(tmp_path / "x", **keywords)]

    assert saved(legacy_format=False) == ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"]
    assert "tokenizer.json" not in saved(legacy_format=True)
    assert saved(filename_prefix="my", legacy_format=False)[0] == "my-tokenizer_config.json"
    assert [path.rsplit("/", 1)[-1] for path in small.save_vocabulary(tmp_path, "my")] == [
        "my-vocab.json",
        "my-merges.txt",
    ]
    sent = []
    monkeypatch.setattr(
        "groupvit_common.compat.tokenizer.push", lambda directory, repo_id, **options: sent.append((repo_id, options))
    )
    small.save_pretrained(tmp_path / "name", push_to_hub=True, private=True)
    small.save_pretrained(tmp_path / "name", push_to_hub=False, repo_id="unused")
    assert sent == [("name", {"commit_message": "Upload tokenizer", "private": True})]


def test_forms_and_names_of_a_vocabulary(small, tmp_path):
    merges = VOCABULARY[1].read_text(encoding="utf-8").split("\n")[1:-1]
    text = "a red star"
    small.save_pretrained(tmp_path)
    assert CLIPTokenizerFast(None, None, str(tmp_path / "tokenizer.json"))(text) == small(text)
    assert CLIPTokenizerFast(vocab=small.encoder, merges=merges)(text) == small(text)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    small.save_pretrained(tmp_path)
    assert CLIPTokenizerFast(None, None, str(tmp_path / "tokenizer.json"))(text) == small(text)
    assert CLIPTokenizerFast(vocab=small.encoder, merges=pairs, max_len=9).model_max_length == 9


def test_training_as_transformers_does_it(small):
    texts = ["a red star", "a green square", "red red stars"] * 4
    tokenizer = small.train_new_from_iterator([texts], 300, new_special_tokens=["<new>"])
    # Special tokens first, bytes next: as recorded from 4.49.
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<|startoftext|>", "<|endoftext|>", "<new>", "!"]
    assert tokenizer("a red star").input_ids[:2] == [0, tokenizer.vocab["a</w>"]]
    assert (tokenizer.additional_special_tokens, tokenizer.eos_token_id) == (["<new>"], 1)
    renamed = small.train_new_from_iterator(texts, 300, special_tokens_map={"<|endoftext|>": "<end>"})
    assert (renamed.eos_token, renamed.eos_token_id, renamed("a").input_ids[-1]) == ("<end>", 1, 1)


def test_arguments_that_make_a_tokenizer_again(small):
    tokenizer = CLIPTokenizerFast(*VOCABULARY, extra={"kept": 1}, padding_side="left")
    parameters = list(inspect.signature(CLIPTokenizerFast.__init__).parameters.values())
    optional = {each.name for each in parameters if each.default is not each.empty}
    assert optional - {"vocab_file", "merges_file", "tokenizer_file"} <= tokenizer.init_kwargs.keys()
    learned = tokenizer.train_new_from_iterator(["a red star"], 300)
    assert (learned.extra, learned.padding_side) == ({"kept": 1}, "left")
    again = CLIPTokenizerFast(*VOCABULARY, **{name: tokenizer.init_kwargs[name] for name in ("extra", "eos_token")})
    assert again("a red star") == small("a red star")


def test_an_unset_special_token_has_no_id(own):
    assert own.mask_token is own.convert_tokens_to_ids(own.mask_token) is None


def test_there_is_no_chat(own):
    assert own.chat_template is None
    for ask in (
        lambda: own.apply_chat_template([{"role": "user", "content": "a star"}], tokenize=False),
        lambda: own.get_chat_template(),
        lambda: setattr(own, "chat_template", "{{ messages }}"),
    ):
        with pytest.raises(InputError, match="GroupViT has no chat"):
            ask()


def test_names_of_base_classes(small):
    assert isinstance(small, PreTrainedTokenizerBase)
    assert isinstance(small, PreTrainedTokenizerFast)
    assert not isinstance(CLIPTokenizer(*VOCABULARY), PreTrainedTokenizerFast)
    assert (CLIPTokenizer.padding_side, CLIPTokenizer.truncation_side) == ("right", "right")
    assert CLIPTokenizer.model_input_names == ["input_ids", "attention_mask"]


def test_copies_are_tokenizers_of_their_own(own):
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        copied.add_tokens("<x>")
        copied.pad_token = "!"
        assert (len(copied), len(own), own.pad_token) == (561, 560, "<|endoftext|>")
        assert copied("a red star") == own("a red star")


def test_repr_names_what_matters(small):
    assert repr(small).startswith(
        "CLIPTokenizerFast(name_or_path='', vocab_size=560, model_max_length=77, is_fast=True"
    )
    assert '559: AddedToken("<|endoftext|>"' in repr(small)


# -- BatchEncoding --


def test_from_tokens_to_words_and_characters(small):
    batch = small(["a red star", "a greenest star"], padding=True)
    assert batch.is_fast
    assert batch.n_sequences == 1
    assert batch.word_ids(1)[:3] == [None, 0, 1]
    assert batch.char_to_token(2) == batch.char_to_token(0, 2) == 2
    assert batch.token_to_chars(2) == CharSpan(2, 5)
    assert batch.token_to_word(1, -1) is None
    first, last = batch.word_to_tokens(1, 1)
    assert batch.word_to_tokens(1, 1) == TokenSpan(2, last)
    assert (first, batch.word_to_chars(1, 1)) == (2, CharSpan(2, 10))
    assert batch.char_to_word(1, 4) == batch.token_to_word(1, 3) == 1
    assert batch.token_to_sequence(0, 1) == 0
    # Padding is part of the encodings, as it is of the ids.
    assert batch[0].ids == batch.input_ids[0]
    assert isinstance(batch[0], Encoding)
    assert [len(each) for each in batch[0:2]] == [len(row) for row in batch.input_ids]


def test_an_encoding_is_a_dictionary_whatever_else_it_is(small):
    batch = small(["a", "a red star"], padding=True, return_tensors="pt")
    assert isinstance(batch, dict | collections.abc.Mapping)
    assert batch.data["input_ids"] is batch["input_ids"]
    batch.data = {"input_ids": batch["input_ids"]}
    assert list(batch.keys()) == ["input_ids"]
    for copied in (batch.copy(), copy.copy(batch), copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert type(copied) is BatchEncoding
        assert copied.tokens(1) == ["<|startoftext|>", "a</w>", "red</w>", "star</w>", "<|endoftext|>"]
    assert default_collate([{**small("a")}, {**small("b")}])["input_ids"][0].tolist() == [558, 558]
    collated = default_collate([small("a", return_tensors="pt"), small("b", return_tensors="pt")])
    assert collated["input_ids"].shape == (2, 1, 3)


def test_an_encoding_of_no_text(small):
    batch = BatchEncoding({"input_ids": [1, 2, 3]})
    assert (batch[0:2], batch.encodings, batch.is_fast, batch.n_sequences) == ({"input_ids": [1, 2]}, None, False, None)
    with pytest.raises(InputError, match="no encodings of texts"):
        batch.tokens()
    with pytest.raises(KeyError, match="expected a name"):
        _ = batch[0]
    assert batch.convert_to_tensors("pt", prepend_batch_axis=True)["input_ids"].tolist() == [[1, 2, 3]]
    assert BatchEncoding({"a": [[1]]}, tensor_type="np")["a"].tolist() == [[1]]
    with pytest.raises(InputError, match="'a' cannot become one tensor"):
        BatchEncoding({"a": [[1], [1, 2]]}, tensor_type="pt")
