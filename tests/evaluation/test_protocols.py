"""Protocols, and what the page about them says."""

from dataclasses import replace

import pytest

from groupvit_common.errors import InputError
from groupvit_common.evaluation.protocols import ProtocolSettings, default_protocol, protocol_settings


def test_protocols():
    paper = protocol_settings("paper", "voc")
    assert (paper.background, paper.top_k, paper.assignment, paper.names) == (0.95, 5, "hard", "authors")
    assert (paper.shorter_side, paper.window, paper.stride, paper.normalize_prompts) == (448, 448, 224, False)
    assert protocol_settings("paper", "context").background == 0.35
    assert protocol_settings("paper", "coco-object").background == 0.95
    for kind in ("voc20", "context59", "coco-stuff", "ade20k", "cityscapes"):
        assert protocol_settings("tcl", kind) == replace(paper, names="set", background=None)
    assert protocol_settings("native", "voc") == ProtocolSettings(background=0.95)
    assert protocol_settings("paper", "imagenet") == ProtocolSettings(templates="seven", normalize_prompts=False)
    assert (default_protocol("scenes"), default_protocol("voc")) == ("native", "paper")
    with pytest.raises(InputError, match="protocol must be one of paper, tcl, native"):
        protocol_settings("other", "voc")
