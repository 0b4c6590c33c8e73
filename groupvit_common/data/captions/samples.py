"""Entries -> arrays: reads bytes, decodes and augments images, tokenizes captions and prompts about their nouns."""

from __future__ import annotations

import codecs
import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from groupvit_common.data.captions.augment import BadSample, augment, erase
from groupvit_common.data.captions.nouns import nouns_of
from groupvit_common.data.captions.settings import DataSettings
from groupvit_common.data.captions.sources import ByteRange, Entry
from groupvit_common.preprocessing.processor import GroupViTProcessor

_OPEN_FILES = 16
_MOST_BYTES = 256 << 20  # of a file; no image of `max_pixels` needs as many
# Of a caption; the rest would be cut off anyway, after minutes in the tokenizer if it is one long word.
_MOST_CHARACTERS = 10_000


class Samples(NamedTuple):
    """The samples of some entries: G usable ones, with M prompts a caption and T tokens a text.

    causes: of each entry, the reason why it is unusable, or None. images: G times float32 `[3, S, S]`. tokens, mask:
    int64 `[G, 1 + M, T]`, the caption first.
    """

    causes: list[str | None]
    images: list[NDArray[np.float32]]
    tokens: NDArray[np.int64]
    mask: NDArray[np.int64]


class SampleMaker:
    """Makes samples: a pure function of the entries and their seeds; can be sent to another process."""

    def __init__(self, settings: DataSettings, processor: GroupViTProcessor) -> None:
        self.settings, self.tokenizer = settings, processor.tokenizer
        # Images come in their final size; only the normalisation is left.
        self.image_processor = processor.image_processor.replace(do_resize=False, do_center_crop=False)
        self.sentences = settings.sentences
        self._fill = tuple(min(round(255 * mean), 255) for mean in self.image_processor.image_mean)
        self._files: OrderedDict[str, IO[bytes]] = OrderedDict()

    def __call__(self, work: Sequence[tuple[Entry, tuple[int, ...]]]) -> Samples:
        """Returns the samples of entries with their seeds."""
        causes: list[str | None] = []
        images: list[NDArray[np.float32]] = []
        texts: list[str] = []
        for entry, seed in work:
            try:
                rng = np.random.default_rng(seed)
                caption = self._caption(entry)
                pixels = self._pixels(entry, rng)
            except BadSample as bad:
                causes.append(str(bad))
                continue
            causes.append(None)
            images.append(pixels)
            texts += [caption, *self.prompts(caption, rng)]
        each = 1 + self.settings.prompts
        if not images:
            nothing = np.zeros((0, each, self.tokenizer.model_max_length), np.int64)
            return Samples(causes, images, nothing, nothing)
        encoded = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="np")
        tokens, mask = (
            np.asarray(encoded[name], np.int64).reshape(len(images), each, -1)
            for name in ("input_ids", "attention_mask")
        )
        return Samples(causes, images, tokens, mask)

    def prompts(self, caption: str, rng: np.random.Generator) -> list[str]:
        """Returns sentences about nouns of a caption, drawn at random; the caption itself where there are too few."""
        count = self.settings.prompts
        if not count:
            return []
        nouns = nouns_of(caption)
        chosen = rng.permutation(len(nouns))[:count]
        templates = rng.integers(len(self.sentences), size=count)
        made = [
            self.sentences[template].replace("{}", nouns[number])
            for number, template in zip(chosen, templates, strict=False)
        ]
        return made + [caption] * (count - len(made))

    def _caption(self, entry: Entry) -> str:
        if entry.fault is not None:
            raise BadSample(entry.fault)
        if entry.caption is None:
            raise BadSample("no caption")
        content = self._read(entry.caption, "caption") if isinstance(entry.caption, ByteRange) else entry.caption
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        try:
            caption = " ".join(content.decode("utf-16" if utf16 else "utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise BadSample("the caption is not UTF-8") from error
        if "\0" in caption:
            raise BadSample("the caption has null characters, as UTF-16 and binary files have")
        if not caption:
            raise BadSample("the caption is empty")
        return caption[:_MOST_CHARACTERS]

    def _pixels(self, entry: Entry, rng: np.random.Generator) -> NDArray[np.float32]:
        """float32 `[3, S, S]`."""
        if entry.image is None:
            raise BadSample("no image")
        content = self._read(entry.image, "image")
        try:
            image = augment(content, self.settings, self._fill, rng)
        except BadSample:
            raise
        except Exception as error:  # one strange image among millions must not end a run; many will, as bad samples
            raise BadSample(f"the image cannot be processed ({type(error).__name__})") from error
        pixels: NDArray[np.float32] = self.image_processor(np.asarray(image))["pixel_values"][0]
        if rng.random() < self.settings.erasing:
            erase(pixels, rng)
        return pixels

    def _read(self, place: ByteRange, what: str) -> bytes:
        try:
            if place.size is None:
                # A pipe would wait for its writer.
                if not stat.S_ISREG(os.stat(place.path).st_mode):  # noqa: PTH116 (str)
                    raise BadSample(f"the {what} is no regular file")
                with open(place.path, "rb") as file:  # noqa: PTH123 (str)
                    content = file.read(_MOST_BYTES + 1)
            else:
                shard = self._opened(place.path)
                shard.seek(place.offset)
                content = shard.read(min(place.size, _MOST_BYTES + 1))
        except (OSError, ValueError) as error:  # ValueError: a name with a null character
            raise BadSample(f"the {what} file cannot be read ({getattr(error, 'strerror', None) or error})") from error
        if len(content) > _MOST_BYTES:
            raise BadSample(f"the {what} file is too large")
        if place.size is not None and len(content) < place.size:
            raise BadSample(f"the {what} is cut off")
        return content

    def _opened(self, path: str) -> IO[bytes]:
        """Returns a shard, kept open for its other samples."""
        if path not in self._files:
            if len(self._files) == _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[path] = open(path, "rb")  # noqa: PTH123, SIM115 (closed above and in `close`)
        self._files.move_to_end(path)
        return self._files[path]

    def close(self) -> None:
        """Closes the shards that are open."""
        while self._files:
            self._files.popitem()[1].close()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": OrderedDict()}
