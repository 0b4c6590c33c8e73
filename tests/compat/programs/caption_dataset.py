"""Prepares captions as data sets are mapped: batches of texts, lengths, offsets, padding later and in multiples."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BatchEncoding, CLIPTokenizerFast

EXTRA = ["A  Photo, of\tthe CAT's hat!!", "naïve café — 3,5 €", "", "a " * 60]


def tokenize(batch, tokenizer, length=20):
    encoded = tokenizer(batch["caption"], truncation=True, max_length=length, return_length=True)
    return {**encoded, "characters": [len(text) for text in batch["caption"]]}


def mapped(columns, function, batch_size=4):
    size = len(next(iter(columns.values())))
    found = {}
    for start in range(0, size, batch_size):
        for name, values in function({k: v[start : start + batch_size] for k, v in columns.items()}).items():
            found.setdefault(name, []).extend(values)
    return {**columns, **found}


def spans(tokenizer, text, phrase):
    """Tokens of a phrase, found by their offsets in the text."""
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    start = text.index(phrase)
    inside = [
        index
        for index, (begin, end) in enumerate(encoded["offset_mapping"])
        if not encoded["special_tokens_mask"][index] and begin < start + len(phrase) and end > start
    ]
    return inside, tokenizer.convert_ids_to_tokens([encoded["input_ids"][i] for i in inside])


def main(checkpoint, data):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    captions = list(json.loads(Path(data, "captions.json").read_text()).values())
    dataset = mapped({"caption": captions + EXTRA}, lambda batch: tokenize(batch, tokenizer))
    rows = [
        {"input_ids": dataset["input_ids"][i], "attention_mask": dataset["attention_mask"][i]}
        for i in np.argsort(dataset["length"], kind="stable").tolist()
    ]

    def collate(batch):
        return tokenizer.pad(batch, padding=True, pad_to_multiple_of=8, return_tensors="pt")

    batches = list(DataLoader(rows, batch_size=5, collate_fn=collate))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        again = CLIPTokenizerFast.from_pretrained(folder, padding_side="left")
    left = again(["a cat", "two green trees"], padding=True, return_tensors="np")
    encoded = tokenizer(captions[0])
    pieces = tokenizer.tokenize("a street with trees")
    words = tokenizer(["green", "trees"], is_split_into_words=True)
    long = tokenizer(EXTRA[3], max_length=16, truncation=True, stride=4, return_overflowing_tokens=True)
    return {
        "length": dataset["length"],
        "characters": dataset["characters"],
        "batches": [[list(batch["input_ids"].shape), int(batch["attention_mask"].sum())] for batch in batches],
        "ids": batches[0]["input_ids"][:, :8].tolist(),
        "span": spans(tokenizer, captions[0], "red bus"),
        "words": encoded.word_ids(),
        "tokens": encoded.tokens()[:6],
        "character": [encoded.char_to_token(8), list(encoded.token_to_chars(3))],
        "left": [left["input_ids"][:, :3].tolist(), type(left).__name__, type(left["attention_mask"]).__name__],
        "pieces": [pieces, tokenizer.convert_tokens_to_ids(pieces), tokenizer.convert_tokens_to_string(pieces)],
        "decoded": tokenizer.batch_decode(dataset["input_ids"][6:9], skip_special_tokens=True),
        "split": words["input_ids"],
        "pair": tokenizer.encode("a cat", "a dog"),
        "special": [
            tokenizer.bos_token,
            tokenizer.eos_token_id,
            tokenizer.pad_token,
            sorted(tokenizer.all_special_ids),
        ],
        "limits": [tokenizer.model_max_length, tokenizer.vocab_size, len(tokenizer), tokenizer.padding_side],
        "overflow": [len(part) for part in long["input_ids"]],
        "encoding": isinstance(encoded, BatchEncoding),
        "without": tokenizer("a cat", add_special_tokens=False)["input_ids"],
        "vocabulary": [len(tokenizer.get_vocab()), tokenizer.get_vocab()["a</w>"], tokenizer.is_fast],
        "plus": tokenizer.encode_plus("a cat", max_length=6, padding="max_length", truncation=True)["input_ids"],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
