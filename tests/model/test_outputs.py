"""The records behave like transformers' ModelOutput, and like the dictionaries that frameworks walk through."""

import copy
import pickle

import pytest
import torch
from torch.utils import _pytree

from groupvit_torch.outputs import BaseModelOutputWithPooling, GroupViTModelOutput


def record() -> GroupViTModelOutput[int]:
    tower = BaseModelOutputWithPooling(last_hidden_state=1, pooler_output=2, attentions=(3,))
    return GroupViTModelOutput(logits_per_image=10, logits_per_text=20, vision_model_output=tower)


def test_access_by_attribute_key_index_and_slice() -> None:
    out = record()
    assert out.logits_per_image == out["logits_per_image"] == out[0] == 10
    assert out[:2] == (10, 20)
    assert out[-1] == (1, 2, (3,))
    assert out.loss is None
    assert "loss" not in out
    assert list(out) == ["logits_per_image", "logits_per_text", "vision_model_output"]
    assert out.to_tuple() == (10, 20, (1, 2, (3,)))
    with pytest.raises(AttributeError, match="no field 'losses'"):
        _ = out.losses
    with pytest.raises(KeyError):
        _ = out["loss"]
    with pytest.raises(TypeError, match="no field 'colour'"):
        GroupViTModelOutput(colour=1)


def test_assignment_keeps_the_fields_in_order() -> None:
    out = record()
    out.loss = 5
    out["text_embeds"] = 7
    assert list(out) == ["loss", "logits_per_image", "logits_per_text", "text_embeds", "vision_model_output"]
    out.loss = None
    assert "loss" not in out
    with pytest.raises(KeyError, match="no field 'colour'"):
        out["colour"] = 1


def test_copies_and_pickles_are_records() -> None:
    out = record()
    for twin in (copy.copy(out), copy.deepcopy(out), pickle.loads(pickle.dumps(out)), out.copy()):
        assert type(twin) is GroupViTModelOutput
        assert twin == out
        assert type(twin.vision_model_output) is BaseModelOutputWithPooling


def test_rebuilt_from_pairs_as_frameworks_do() -> None:
    out = record()
    assert GroupViTModelOutput((key, value) for key, value in out.items()) == out


def test_torch_walks_through_a_record() -> None:
    out = GroupViTModelOutput(loss=torch.ones(2), text_embeds=torch.zeros(1))
    doubled = _pytree.tree_map(lambda tensor: tensor * 2, out)
    assert type(doubled) is GroupViTModelOutput
    assert doubled.loss.tolist() == [2, 2]
    compiled = torch.compile(lambda x: GroupViTModelOutput(loss=x + 1), backend="eager")
    assert compiled(torch.zeros(1)).loss.item() == 1
