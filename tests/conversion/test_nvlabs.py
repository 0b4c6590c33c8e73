"""The authors' settings: what is written is read back, and what this project's model does not do is refused."""

import copy
import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from conversion.formats.nvlabs import NAMING, read_config
from conversion.formats.nvlabs import settings as settings_of
from conversion.names import entries
from conversion.pickle_records import Global, Inert
from conversion.source import open_source
from conversion.torch_file import read_torch_file
from conversion.torch_states import plain
from conversion.verify import deciding_settings
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.model.parameters import manifest
from tests.support.paths import REFERENCE

CASES = ("nv_three_stage", "nv_two_stage")


def reference(case: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes and settings of a checkpoint of the authors' code."""
    path = REFERENCE / "nvlabs" / case / "checkpoint.pth"
    return {name: info.shape for name, info in open_source(path).tensors.items()}, plain(
        read_torch_file(path).content["config"]
    )


def shapes_of(config: GroupViTConfig) -> dict[str, tuple[int, ...]]:
    return {entry.foreign: entry.shape for entry in entries(NAMING, config)}


def small(text: dict[str, Any] | None = None, **vision: Any) -> GroupViTConfig:
    """A model such as the authors' code has, but for what is changed."""
    return GroupViTConfig(
        text_config={
            "vocab_size": 9, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "max_position_embeddings": 3, "eos_token_id": 8, **(text or {}),
        },
        vision_config={
            "hidden_size": 12, "intermediate_size": 48, "depths": [1, 1, 1], "num_group_tokens": [4, 3, 0],
            "num_output_groups": [4, 3, 3], "num_attention_heads": 2, "image_size": 16, "patch_size": 8, **vision,
        },
        projection_dim=4,
        projection_intermediate_dim=6,
    )  # fmt: skip


# -- written and read again --------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> GroupViTConfig:
    """Any model; many of them such as the authors' code has."""

    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def mostly(usual: Any, other: Any) -> Any:
        return usual if number(0, 7) else other

    stages = number(1, 4)
    tokens = [mostly(number(1, 5), 0) for _ in range(stages - 1)] + [mostly(0, 3)]
    # A stage with tokens wants as many groups as tokens of the one before.
    following = [*tokens[1:], 0]
    groups = [n if after else mostly(n, number(1, 5)) for n, after in zip(tokens, following, strict=True)]
    heads = number(1, 4)
    width = heads * number(1, 9)
    text_width = draw(st.sampled_from([64, 64, 128, 100, 32]))
    text_heads = mostly(max(text_width // 64, 1), 4 if text_width % 4 == 0 else 1)
    patch, vocabulary = number(1, 16), number(3, 9)
    model = dict(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": mostly(4 * text_width, 100),
            "num_hidden_layers": mostly(number(1, 2), 0),
            "num_attention_heads": text_heads,
            "max_position_embeddings": number(1, 4),
            "eos_token_id": draw(st.sampled_from([2, vocabulary - 1])),
            "dropout": 0.0,
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": mostly(4 * width, number(1, 99)),
            "depths": [number(0, 2) for _ in range(stages)],
            "num_group_tokens": tokens,
            "num_output_groups": [n or 1 for n in groups],
            "num_attention_heads": heads,
            "image_size": patch * number(1, 3),
            "patch_size": patch,
            "num_channels": number(1, 4),
            "assign_mlp_ratio": mostly([0.5, 4], [int(width / 2) / width + 1e-9, 4.0]),
            "dropout": mostly(0.0, 0.25),
            "attention_dropout": mostly(0.0, 0.125),
        },
        projection_dim=number(1, 4),
        projection_intermediate_dim=number(1, 4),
        **({"multi_label": number(0, 3)} if number(0, 1) else {}),
    )
    try:
        return GroupViTConfig(**model)
    except InputError:
        reject()  # as a stage without tokens before one with them


def written(config: GroupViTConfig) -> dict[str, Any] | None:
    try:
        return settings_of(config)
    except InputError:
        return None


def possible(config: st.SearchStrategy[GroupViTConfig]) -> st.SearchStrategy[GroupViTConfig]:
    return config.filter(lambda config: written(config) is not None)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(config=possible(configs()), pickled=st.booleans())
def test_whatever_is_written_is_read_back(config: GroupViTConfig, pickled: bool) -> None:
    there = settings_of(config)
    found = read_config(shapes_of(config), inert(there) if pickled else there, "x.pth")
    assert deciding_settings(found) == deciding_settings(config)
    assert manifest(found) == manifest(config)
    for name in ("dropout", "attention_dropout"):
        assert getattr(found.vision_config, name) == getattr(config.vision_config, name)
    assert found.extra == config.extra
    # What is read can be written again, and is the same.
    assert settings_of(found) == there


def inert(value: Any) -> Any:
    """As OmegaConf's objects are read from a pickle."""
    if isinstance(value, dict):
        return Inert(
            Global("omegaconf.dictconfig", "DictConfig"), state={"_content": {k: inert(v) for k, v in value.items()}}
        )
    if isinstance(value, list):
        return Inert(Global("omegaconf.listconfig", "ListConfig"), state={"_content": [inert(v) for v in value]})
    return Inert(Global("omegaconf.nodes", "AnyNode"), state={"_val": value})


@pytest.mark.parametrize("case", CASES)
def test_the_authors_settings_come_back(case: str) -> None:
    shapes, settings = reference(case)
    image = settings["model"]["img_encoder"]
    back = settings_of(read_config(shapes, settings, "x.pth"))["model"]["img_encoder"]
    # Only the rate of dropped paths is of no use here.
    assert {name: back[name] for name in image if name != "drop_path_rate"} == {
        name: value for name, value in image.items() if name != "drop_path_rate"
    }
    # Without their settings only the number of heads is a guess.
    if case == "nv_two_stage":
        with pytest.raises(CheckpointError, match=r"no multiple of 64: pass a configuration \(--config\)"):
            read_config(shapes, None, "x.pth")


@pytest.mark.parametrize("width", [2, 3, 15, 65])
def test_odd_widths(width: int) -> None:
    """int(0.5 * 15) is 7, which is no other ratio than the authors' 0.5."""
    config = small(hidden_size=width, intermediate_size=4 * width, num_attention_heads=1)
    found = read_config(shapes_of(config), settings_of(config), "x.pth")
    assert found.vision_config.assign_mlp_ratio == [0.5, 4]


def test_ratios_of_another_model_are_kept() -> None:
    config = small(assign_mlp_ratio=[0.25, 2])
    settings = settings_of(small())
    found = read_config(shapes_of(config), settings, "x.pth")
    assert manifest(found) == manifest(config)


def test_settings_that_other_settings_give() -> None:
    """OmegaConf pickles "${data.text_aug.multi_label}" as it stands; so does the released configuration."""
    config = small()
    settings = settings_of(config)
    settings |= {
        "data": {"text_aug": {"multi_label": 3}, "size": "${sizes.image}"},
        "sizes": {"image": 16, "depths": [1, 1, 1]},
    }
    settings["loop"] = "${loop}"
    settings["loops"] = ["${loops}", "${loops}"]
    settings["model"]["multi_label"] = "${data.text_aug.multi_label}"
    image = settings["model"]["img_encoder"]
    image |= {"img_size": "${data.size}", "depths": "${sizes.depths}", "patch_size": "${loop}", "in_chans": "${a b}"}
    settings["model"]["output_dim"] = "${nothing.here}"
    found = read_config(shapes_of(config), settings, "x.pth")
    assert found.multi_label == 3
    assert deciding_settings(found) == deciding_settings(config)
    settings["sizes"]["image"] = 32
    with pytest.raises(CheckpointError, match="img_size = 32, its tensors 16"):
        read_config(shapes_of(config), settings, "x.pth")
    image["num_group_tokens"] = "${loops}"
    with pytest.raises(CheckpointError, match="contradicts itself"):
        read_config(shapes_of(config), settings, "x.pth")


# -- what is refused ---------------------------------------------------------------------------------------------------


HUGE = 1 << 40_000


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"hard_assignment": False}, r"assigns patches to groups softly \(hard_assignment False\)"),
        ({"hard_assignment": True}, None),
        ({"hard_assignment": None}, None),
        ({"qk_scale": None}, None),
        ({"qk_scale": 6**-0.5}, None),
        ({"qk_scale": 0.3}, r"scales attention by 0\.3 \(qk_scale\)"),
        ({"qk_scale": [1]}, r"scales attention by \[1\]"),
        ({"pos_embed_type": "simple"}, None),
        ({"pos_embed_type": "fourier"}, None),
        ({"pos_embed_type": "rotary"}, "position embeddings of type 'rotary'"),
        ({"mlp_ratio": 4.0}, None),
        ({"mlp_ratio": 3}, "mlp_ratio = 3, its tensors 4"),
        ({"mlp_ratio": "x"}, "mlp_ratio = 'x', its tensors 4"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio = nan, its tensors 4"),
        ({"depths": [1]}, r"depths = \[1\], its tensors \[1, 1, 1\]"),
        ({"num_output_groups": [4, 3]}, None),
        ({"num_output_groups": [4, 3, 9]}, None),
        ({"num_output_groups": [4]}, r"num_output_groups = \[4\], its tensors \[4, 3, 3\]"),
        ({"num_output_groups": [4, 2]}, r"num_output_groups = \[4, 2\], its tensors"),
        ({"img_size": HUGE}, "img_size = 'an integer of 40001 bits', its tensors 16"),
        ({"depths": [HUGE]}, r"depths = \['an integer of 40001 bits'\]"),
        ({"depths": [[1] * 1000] * 1000}, r"depths = \[(None, ){8}\.\.\.\]"),
        ({"embed_factors": [HUGE] * 100}, r"widths \(embed_factors \['an integer of 40001 bits', "),
        ({"num_heads": [HUGE, 1, 1]}, r"numbers of heads \(\['an integer of 40001 bits', 1, 1\]\)"),
        ({"num_group_tokens": "x" * 100_000}, r"num_group_tokens = 'x{40}'\.\.\., its tensors"),
        ({"embed_dim": "\x1b[2J"}, r"embed_dim = '\\x1b\[2J', its"),
    ],
    ids=itertools.count(),
)
def test_models_of_the_authors_code_alone(settings: dict[str, Any], says: str | None) -> None:
    config = small()
    there = settings_of(config)
    there["model"]["img_encoder"] |= copy.deepcopy(settings)
    if says is None:
        assert deciding_settings(read_config(shapes_of(config), there, "x.pth")) == deciding_settings(config)
        return
    with pytest.raises(CheckpointError, match=says) as caught:
        read_config(shapes_of(config), there, "x.pth")
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", [HUGE, "three", [3], None], ids=["huge", "text", "list", "none"])
def test_a_number_of_labels_that_is_none_is_passed_by(value: Any) -> None:
    there = settings_of(small())
    there["model"]["multi_label"] = value
    found = read_config(shapes_of(small()), there, "x.pth")
    assert found.extra == {}


def test_wider_layers_than_grouping_blocks() -> None:
    """In the authors' code `mlp_ratio` is not that of the grouping blocks; elsewhere both have one width."""
    shapes = shapes_of(small())
    for name, shape in shapes.items():
        if ".blocks." in name and ".mlp." in name and shape != (12,):
            shapes[name] = tuple(36 if n == 48 else n for n in shape)
    with pytest.raises(CheckpointError, match=r"MLPs of different widths \(36, 48: an mlp_ratio other than 4"):
        read_config(shapes, settings_of(small()), "x.pth")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (small(num_group_tokens=[4, 0, 0]), r"num_group_tokens \[4, 0, 0\] \(in every stage but the last\)"),
        (small(num_group_tokens=[4, 3, 2]), r"num_group_tokens \[4, 3, 2\] \(in every stage but the last\)"),
        (small(intermediate_size=36), r"vision_config.intermediate_size 36 \(only 48\)"),
        (small(assign_mlp_ratio=[0.25, 2]), r"vision_config.assign_mlp_ratio \[0.25, 2\] \(only \[0.5, 4\]\)"),
        (small({"hidden_size": 32, "num_attention_heads": 4}), r"with text_config.intermediate_size 256 \(only 128\), "
         r"text_config.hidden_size 32 \(at least 64, the width of a head there\)$"),
        (small({"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}),
         r"with text_config.num_attention_heads 4 \(only 2: a head is 64 wide there\)$"),
        (small({"num_hidden_layers": 0}), "text_config.num_hidden_layers 0"),
        (small({"eos_token_id": 3}), r"text_config.eos_token_id 3 \(only the last id, 8\)"),
    ],
)  # fmt: skip
def test_models_that_the_authors_code_does_not_have(config: GroupViTConfig, says: str) -> None:
    with pytest.raises(InputError, match=f"the authors' code, .*, has no model .*{says}"):
        settings_of(config)
