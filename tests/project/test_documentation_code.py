"""The code of README and docs runs, and their commands are ones that the parsers take.

A block that does not run here has `<!-- not run: the reason -->` in the line before it. The model of the hub is a small
random one; photos are synthetic.
"""

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from groupvit_common.cli.command_line import build_parser
from groupvit_common.model import GroupViTConfig
from groupvit_common.preprocessing import GroupViTProcessor, load_image
from tests.support.clips import write_clip
from tests.support.fake_hub import FakeHub, point_to
from tests.support.paths import ROOT
from tests.support.peers import make_checkpoint

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>.+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.S | re.M)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    not_run: str | None


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(path.name, line, match["language"], match["code"], match["reason"])


EVERY = [block for path in PAGES for block in blocks(path)]


# ---- commands ----


def commands() -> Iterator[tuple[str, str]]:
    """Lines of blocks without a language, with the place of the block."""
    for block in EVERY:
        if block.language or block.not_run:
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            yield f"{block.page}:{block.line}", line.strip()


def arguments(line: str) -> list[str]:
    return shlex.split(line, comments=True)


# But those that show a command's form: `groupvit convert SOURCE DEST [--to FORMAT]`.
GROUPVIT = sorted({line for _, line in commands() if re.match(r"groupvit \w|torchrun ", line) and " [--" not in line})


@pytest.mark.parametrize("line", GROUPVIT)
def test_a_command_is_one_that_the_parser_takes(line: str) -> None:
    words = arguments(line)
    if words[0] == "torchrun":
        words = words[words.index("groupvit_common.cli") :]
    options = build_parser().parse_args(words[1:])
    assert callable(options.run)


def test_other_commands_name_what_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wrong, seen = [], 0
    for place, line in commands():
        words = arguments(line) if re.match(r"make |pip install |python3? -m ", line) else []
        named: list[bool] = []
        if words[:1] == ["make"]:
            named = [re.search(rf"^{word}:", makefile, re.M) is not None for word in words[1:] if "=" not in word]
        elif words[:2] == ["pip", "install"]:
            found = [re.fullmatch(r"(?:\.|groupvit)\[(.+)\]", word) for word in words[2:]]
            named = [extra in extras for match in found if match for extra in match[1].split(",")]
        elif words and words[2].startswith(("benchmarks.", "conversion.", "docs.", "examples.", "groupvit_")):
            path = ROOT.joinpath(*words[2].split("."))
            named = [path.is_dir() or path.with_suffix(".py").is_file()]
        seen += len(named)
        if not all(named):
            wrong.append(f"{place}: {line}")
    assert wrong == []
    assert seen > 10


# ---- Python ----

Variables = dict[str, Any]


class Setting(NamedTuple):
    """What a page's blocks find. `variables`: names that the text before a block gives a meaning; `changed`: parts of
    the code that ask for what is not here, or for minutes, and what runs in their place."""

    variables: Callable[[], Variables] = dict
    changed: tuple[tuple[str, str], ...] = ()


def _tf_pairs() -> Variables:
    import keras
    import tensorflow as tf

    processor = GroupViTProcessor.from_pretrained("hub")
    image = load_image("photo.jpg")
    texts = ["a cat", "a dog", "two cats", "a couch"]
    pairs = dict(processor(text=texts, images=[image] * 4, return_tensors="np", padding=True))
    pairs["input_ids"], pairs["attention_mask"] = (pairs[n].astype(np.int32) for n in ("input_ids", "attention_mask"))
    dataset = tf.data.Dataset.from_tensor_slices(pairs).batch(4)
    return {"keras": keras, "dataset": dataset, "validation": dataset, "image": image}


def _usage() -> Variables:
    from groupvit_torch import Segmenter

    names = ["red", "blue", "green"]
    segmenter = Segmenter.from_pretrained("demo", labels=names, background=0.9)
    array = np.random.default_rng(0).standard_normal((3, GroupViTConfig.from_pretrained("hub").projection_dim))
    return {
        "Segmenter": Segmenter, "model": "demo", "words": names, "names": names, "array": array,
        "segmenter": segmenter, "other_segmenter": segmenter,
    }  # fmt: skip


def _clip() -> Variables:
    write_clip(Path("clip.mp4"), [np.full((48, 64, 3), 80 * number, np.uint8) for number in range(3)])
    return {}


SETTINGS = {
    "README.md": Setting(_tf_pairs),
    "adapters.md": Setting(),
    "checkpoints.md": Setting(changed=(('model.push_to_hub("me/my-groupvit")', ""),)),
    "evaluation.md": Setting(changed=(("limit=20", "limit=1"),)),
    "keras.md": Setting(_tf_pairs),
    "speed.md": Setting(),
    "video.md": Setting(_clip),
    "usage.md": Setting(_usage, (('device="cuda"', 'device="cpu"'), ("window=448, stride=224", "window=64"))),
}
# Pages whose blocks run in tests of their own.
ELSEWHERE = {
    "deployment.md": "tests/conversion/test_exports.py",
    "jax.md": "tests/groupvit_tf/test_jax.py",
    "migrating.md": "tests/project/test_documentation_migrating.py",
    "serving.md": "tests/serving/test_client.py",
}


def runnable() -> list[str]:
    return [b.page for b in EVERY if b.language == "python" and b.not_run is None and b.page not in ELSEWHERE]


def test_every_page_with_code_is_run() -> None:
    assert sorted(set(runnable())) == sorted(SETTINGS)
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())
    assert {block.language for block in EVERY} <= {"", "json", "nginx", "python", "sh", "toml"}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with photos, a trained model and a hub."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("holiday").mkdir()
    for name in ("photo.jpg", "a.jpg", "b.jpg", "holiday/one.jpg", "holiday/two.jpg"):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(name)
    make_checkpoint(tmp_path / "hub", text_layers=1, depths=(1, 1, 0), groups=(6, 5))
    shutil.copytree("hub", "runs/mine")
    with FakeHub() as fake:
        point_to(fake.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        fake.add("nvidia/groupvit-gcc-yfcc", {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()})
        yield
        huggingface_hub.close_session()


@pytest.fixture
def eagerly() -> Iterator[None]:
    """Keras without graphs: `fit` at once instead of after seconds of tracing."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("page", SETTINGS)
def test_the_code_of_a_page_runs(world: None, page: str, request: pytest.FixtureRequest) -> None:
    setting = SETTINGS[page]
    if setting.variables is not dict and "tf" in setting.variables.__name__:
        request.getfixturevalue("eagerly")
    variables = setting.variables()
    for block in EVERY:
        if block.page != page or block.language != "python" or block.not_run:
            continue
        code = block.code
        for part, other in setting.changed:
            code = code.replace(part, other)
        # Lines keep their numbers in the page, for the traceback.
        exec(compile("\n" * block.line + code, page, "exec"), variables)
