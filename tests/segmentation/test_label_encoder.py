"""Prompts go through the text tower with others of their length."""

import numpy as np
import pytest

from groupvit_common.preprocessing.prompts import Label
from groupvit_common.preprocessing.tokenizer import CLIPTokenizer
from groupvit_common.segmentation import label_encoder
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.predictor import DEMO_MODEL


def test_prompts_are_sorted_by_length_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_MODEL)
    names = ["red", "red circle on the blue square", "blue", "a small green star above the red one", "green", "star"]
    shapes = []

    def embed(tokens):
        ids, attended = tokens["input_ids"], tokens["attention_mask"] == 1
        shapes.append(ids.shape)
        assert attended.all(axis=1).any()
        sums = (ids * attended).sum(axis=1)
        return np.stack([np.cos(sums), np.sin(sums)], axis=1)

    monkeypatch.setattr(label_encoder, "PROMPTS_AT_ONCE", 2)
    encode = label_encoder.LabelEncoder(tokenizer, 32, embed, SegmentationOptions(templates=("{}",)))
    embeds = encode([Label(name) for name in names])
    sums = [sum(tokenizer(name)["input_ids"]) for name in names]
    np.testing.assert_allclose(embeds, np.stack([np.cos(sums), np.sin(sums)], axis=1), atol=1e-12)  # float64 rounding
    widths = [width for _, width in shapes]
    assert [rows for rows, _ in shapes] == [2, 2, 2]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
