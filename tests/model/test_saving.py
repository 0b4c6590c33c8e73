"""What is saved is whole, belongs together, and can be loaded again; what cannot be is refused before anything is
written."""

import copy
import importlib
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groupvit_common.checkpoints import hub
from groupvit_common.checkpoints.directory import find_weights
from groupvit_common.checkpoints.safetensors_file import read_arrays, read_header
from groupvit_common.cli import evaluate
from groupvit_common.errors import CheckpointError, GroupViTError, InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.preprocessing.tokenizer import CLIPTokenizer
from groupvit_common.storage import saving
from groupvit_common.storage.saving import read_lock, write_files, write_text, write_texts
from groupvit_common.training.recipe import get_recipe
from groupvit_common.training.settings import changed
from groupvit_common.training.start import start_processor
from tests.support.backends import Backend
from tests.support.models import smallest_config

SHARDS = {"max_shard_size": 2000}


@pytest.fixture(scope="module")
def processor() -> GroupViTProcessor:
    tokenizer = CLIPTokenizer.train(["a photo of a cat and a couch"] * 9, 530, model_max_length=12)
    return GroupViTProcessor(GroupViTImageProcessor(size=16, crop_size=16), tokenizer)


def configuration() -> GroupViTConfig:
    """One that fits the processor."""
    config = smallest_config()
    config.text_config.update({"vocab_size": 527, "eos_token_id": 526})
    return config


@cache
def models(backend: Backend) -> tuple[Any, Any]:
    """Two models of one configuration and different weights, which no test changes."""
    first = backend.build(configuration())
    weights = {name: value + 1 for name, value in backend.weights(first).items()}
    return first, backend.build(configuration(), weights)


def stored(directory: Path) -> dict[str, np.ndarray]:
    """Returns the tensors that a model would be loaded from."""
    with read_lock(directory) as held:
        files_of = find_weights(held).files
        return {name: array for path in files_of for name, array in read_arrays(path, files_of[path])}


def equal(backend: Backend, model: Any, arrays: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(arrays[name], value) for name, value in backend.weights(model).items())


def visible(directory: Path) -> set[str]:
    assert not [path.name for path in directory.iterdir() if path.name.startswith(".")]
    return {path.name for path in directory.iterdir()}


# -- whole or not at all --


def test_a_save_killed_at_any_step_leaves_the_old_set_or_the_new_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.kill_saving", str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"wrong": [], "outcomes": ["new", "old"]}


@pytest.mark.parametrize(("before", "after"), [(SHARDS, SHARDS), (SHARDS, {})])
def test_a_model_whose_files_were_moved_in_part_is_the_new_one(backend, before, after, tmp_path, monkeypatch):
    old, new = models(backend)
    old.save_pretrained(tmp_path, **before)
    real, left = Path.replace, 1

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path, **after)
    # Whoever cannot write there reads through what is left to be done, and leaves it.
    monkeypatch.setattr(saving, "_move", no_right)
    loaded = backend.weights(backend.load(tmp_path)) if not after else stored(tmp_path)
    assert equal(backend, new, loaded)
    assert (tmp_path / ".groupvit-commit").is_dir()
    monkeypatch.undo()
    assert equal(backend, new, stored(tmp_path))
    assert "config.json" in visible(tmp_path)
    assert ("model.safetensors" in visible(tmp_path)) == (not after)


def no_right(directory: Path) -> None:
    raise PermissionError(13, "Permission denied")


def test_readers_meet_whole_sets_while_others_save(tmp_path):
    names = [f"{number}.json" for number in range(4)]
    write_texts(tmp_path, dict.fromkeys(names, "start"))

    def save(writer: str) -> None:
        for turn in range(6):
            write_texts(tmp_path, dict.fromkeys(names, f"{writer}{turn}"))

    writers = [threading.Thread(target=save, args=(writer,)) for writer in "ab"]
    for writer in writers:
        writer.start()
    while True:
        alive = any(writer.is_alive() for writer in writers)
        with read_lock(tmp_path) as held:
            assert len({(held / name).read_text() for name in names}) == 1
        if not alive:
            break
    assert (tmp_path / names[0]).read_text() in ("a5", "b5")
    assert visible(tmp_path) == set(names)


def test_leftovers_of_the_dead_are_removed_and_of_the_living_are_not(tmp_path):
    dead, foreign = tmp_path / ".groupvit-0123abcd.tmp", tmp_path / ".groupvit-notes"
    dead.mkdir()
    (dead / "model.safetensors").write_text("half")
    foreign.mkdir()
    with saving._staging(tmp_path) as living:
        write_texts(tmp_path, {"a.json": "{}"})
        assert {path.name for path in tmp_path.iterdir()} == {living.name, foreign.name, "a.json"}
    assert {path.name for path in tmp_path.iterdir()} == {foreign.name, "a.json"}


def test_a_save_that_begins_as_another_ends_is_not_removed_with_what_that_leaves(tmp_path, monkeypatch):
    real_remove, real_settle, saves = saving.shutil.rmtree, saving.settle, []

    def remove(path: Path, **options: bool) -> None:
        if not saves:
            # The first has moved its files. The second looked before the first began, and takes its place now.
            looks = iter([lambda directory: None])
            monkeypatch.setattr(saving, "settle", lambda directory: next(looks, real_settle)(directory))
            saves.append(threading.Thread(target=write_texts, args=(tmp_path, {"a": "second", "b": "second"})))
            saves[0].start()
            while not (tmp_path / ".groupvit-commit" / "a").exists():
                time.sleep(0.001)
        real_remove(path, **options)

    monkeypatch.setattr(saving.shutil, "rmtree", remove)
    write_texts(tmp_path, {"a": "first", "b": "first"})
    saves[0].join()
    assert {(tmp_path / name).read_text() for name in visible(tmp_path)} == {"second"}


def test_a_folder_that_only_looks_like_a_save_moves_nothing_out_of_place(tmp_path):
    commit, outside = tmp_path / "model" / ".groupvit-commit", tmp_path / "outside.json"
    commit.mkdir(parents=True)
    for names in (["../outside.json"], [5], "x", [".."], [""], ["."]):
        (commit / ".manifest.json").write_text(json.dumps({"files": names, "family": None}))
        with pytest.raises(CheckpointError, match="not what a save of this package leaves"):
            GroupViTConfig.from_pretrained(tmp_path / "model", local_files_only=True)
    assert not outside.exists()


def savers(processor: GroupViTProcessor) -> Iterator[tuple[str, Callable[[Path], object], str]]:
    yield "configuration", smallest_config().save_pretrained, "config.json"
    yield "tokenizer", processor.tokenizer.save_pretrained, "tokenizer.json"
    yield "image processor", processor.image_processor.save_pretrained, "preprocessor_config.json"
    yield "processor", processor.save_pretrained, "vocab.json"
    for name in ("torch", "tf"):
        if importlib.util.find_spec({"tf": "tensorflow"}.get(name, name)):
            package = importlib.import_module(f"groupvit_{name}")
            yield name, package.GroupViTModel(smallest_config()).save_pretrained, "model.safetensors"


def test_everything_that_is_saved_replaces_links_and_fails_in_one_sentence(processor, tmp_path, monkeypatch):
    for name, save, file in savers(processor):
        # As in the hub's cache: files are links to blobs, which belong to other snapshots too.
        snapshot, blob = tmp_path / name / "snapshot", tmp_path / name / "blob"
        snapshot.mkdir(parents=True)
        blob.write_text("old")
        (snapshot / file).symlink_to(blob)
        link = tmp_path / name / "link"
        link.symlink_to(snapshot, target_is_directory=True)
        save(link)
        assert blob.read_text() == "old"
        assert not (snapshot / file).is_symlink()
        assert file in visible(snapshot)
        with pytest.raises(InputError, match="blob is a file; expected the path of a directory"):
            save(blob)
        with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
            save(blob / "inside")
        (tmp_path / name / "folder" / file).mkdir(parents=True)
        with pytest.raises(InputError, match="is a folder; a file of this name is to be saved there"):
            save(tmp_path / name / "folder")
        before = {path.name: path.read_bytes() for path in snapshot.iterdir()}
        with monkeypatch.context() as patched:
            patched.setattr(saving, "flush", full_disk)
            with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
                save(snapshot)
        assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == before


def full_disk(path: Path) -> None:
    raise OSError(28, "No space left on device")


def test_shards_have_names_of_their_own_and_those_of_different_saves_are_refused(backend, tmp_path):
    first, second = models(backend)
    for model in (first, second):
        model.save_pretrained(tmp_path / "a", **SHARDS)
    first.save_pretrained(tmp_path / "b", **SHARDS)
    shards = {path.name for path in find_weights(tmp_path / "a").files}
    assert not shards & {path.name for path in (tmp_path / "b").iterdir()}
    assert visible(tmp_path / "a") == shards | {"config.json", "model.safetensors.index.json"}
    assert equal(backend, second, stored(tmp_path / "a"))

    second.save_pretrained(tmp_path / "c", **SHARDS)
    name = next(iter(find_weights(tmp_path / "b").files)).name
    (tmp_path / "c" / name).replace(tmp_path / "b" / name)
    with pytest.raises(CheckpointError, match="shards of different saves"):
        backend.load(tmp_path / "b")


def test_a_sharded_checkpoint_is_known_by_all_its_bytes(backend, tmp_path):
    first, second = models(backend)
    digests = set()
    for number, (model, options) in enumerate(((first, {}), (first, SHARDS), (second, SHARDS))):
        model.save_pretrained(tmp_path / str(number), **options)
        digests.add(evaluate._weights_of(tmp_path / str(number))["weights"])
    assert len(digests) == 3


# -- what is refused when it is saved --


def test_tensors_that_no_configuration_describes_are_refused_in_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import parametrizations, prune

    from groupvit_torch import GroupViTModel

    def weight_norm(model: Any) -> None:
        parametrizations.weight_norm(model.visual_projection[0])

    def pruned(model: Any) -> None:
        prune.l1_unstructured(model.text_projection[0], "weight", 0.5)

    def head(model: Any) -> None:
        model.classifier = torch.nn.Linear(6, 3)

    def adapter(model: Any) -> None:
        model.text_projection[0].lora_A = torch.nn.Linear(8, 2)

    def resized(model: Any) -> None:
        model.text_model.embeddings.token_embedding = torch.nn.Embedding(33, 8)

    def integers(model: Any) -> None:
        model.logit_scale = torch.nn.Parameter(torch.tensor(3), requires_grad=False)

    for change, message in (
        (weight_norm, r"visual_projection\.0\.parametrizations\.weight\.original0.*remove_parametrizations"),
        (pruned, r"text_projection\.0\.weight_orig.*prune"),
        (head, r"2 added: classifier\.weight, classifier\.bias.*take off"),
        (adapter, r"lora_A\.weight.*merge adapters"),
        (resized, r"token_embedding\.weight \(\[33, 8\] float32, expected \[30, 8\] float32\).*set the configuration"),
        (integers, r"logit_scale \(\[\] int64, expected \[\] float32\)"),
    ):
        model = GroupViTModel(smallest_config())
        change(model)
        with pytest.raises(InputError, match=message) as caught:
            model.save_pretrained(tmp_path / "model")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_variables_that_no_configuration_describes_are_refused_in_keras(tmp_path):
    keras = pytest.importorskip("keras")
    tf = pytest.importorskip("groupvit_tf")
    model = tf.GroupViTModel(smallest_config())
    next(layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Dense)).enable_lora(2)
    with pytest.raises(InputError, match=r"2 added: .*lora_kernel_a.*merge adapters"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_class_of_the_users_own_keeps_its_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    from groupvit_torch import GroupViTModel

    class WithHead(GroupViTModel):
        def __init__(self, config: GroupViTConfig) -> None:
            super().__init__(config)
            self.head = torch.nn.Linear(6, 3)

    model = WithHead(smallest_config())
    model.save_pretrained(tmp_path)
    assert torch.equal(WithHead.from_pretrained(tmp_path).head.weight, model.head.weight)


@pytest.mark.parametrize("package", ["groupvit_torch", "groupvit_tf"])
def test_not_finite_is_what_a_sum_may_hide(package: str) -> None:
    """Infinities of both signs, and finite values whose sum is infinite."""
    not_finite = importlib.import_module(f"{package}.checkpoint").not_finite
    tensor = importlib.import_module("torch").tensor if package == "groupvit_torch" else np.asarray
    for values, expected in (
        ([1.0, np.nan], True),
        ([np.inf, -np.inf], True),
        ([-np.inf, 1.0], True),
        ([3e38, 3e38], False),
        ([3e38, -3e38], False),
    ):
        assert not_finite(tensor(np.asarray(values, np.float32))) is expected, values


def test_weights_that_are_not_finite_are_neither_saved_nor_used(backend, processor, tmp_path):
    package = importlib.import_module(f"groupvit_{backend.name}")
    model = models(backend)[0]
    weights = dict(backend.weights(model))
    name = "visual_projection.1.running_var"
    weights[name] = np.full_like(weights[name], np.nan)
    broken = backend.build(configuration(), weights)
    model.save_pretrained(tmp_path)
    ways = [partial(broken.save_pretrained, tmp_path)]
    if backend.name == "tf":
        import keras

        ways += [partial(broken.save, tmp_path / "m.keras"), partial(broken.save_weights, tmp_path / "m.weights.h5")]
        ways += [partial(keras.saving.save_model, broken, tmp_path / "n.keras")]
    for save in ways:
        with pytest.raises(InputError, match=rf"cannot be saved, because 1 of its tensors hold NaN .*\({name}\)"):
            save()
    assert equal(backend, model, stored(tmp_path))
    # A file of another program.
    arrays = {key: weights[key] for key in weights}
    save_numpy = pytest.importorskip("safetensors.numpy").save_file
    save_numpy(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"cannot be used, because 1 of its tensors .*\({name}\)"):
        package.Segmenter.from_pretrained(tmp_path, processor=processor, device="cpu")


def test_json_never_says_nan():
    config = smallest_config()
    config.measured = float("nan")
    with pytest.raises(InputError, match="not finite"):
        config.to_json_string()


# -- one reader --

ODD = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**20, 1.5, 1e300, "", "x", "1", [], {}, [1], [[]], {"self": 1}, [None],
    {"content": 5}, {"height": 2**31, "width": 3},
]  # fmt: skip
RAW = ["1" + "0" * 400, "NaN", "1e999", '"\\ud800"', "[" * 70 + "]" * 70]
KEYS = ["self", "cls", "extra", "model_type", "", "content", "__class__", "validate"]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inner)[:40]:
        yield from places(item, (*at, key))


def mutated(content: Any, chance: random.Random) -> str:
    content = copy.deepcopy(content)
    *way, last = chance.choice([place for place in places(content) if place])
    holder = content
    for key in way:
        holder = holder[key]
    kind = chance.choice(["odd", "odd", "odd", "raw", "gone", "key"])
    if kind == "gone":
        del holder[last]
    elif kind == "key" and isinstance(holder, dict):
        holder[chance.choice(KEYS)] = chance.choice(ODD)
    else:
        holder[last] = "RAW" if kind == "raw" else chance.choice(ODD)
    return json.dumps(content).replace('"RAW"', chance.choice(RAW))


def test_mutated_json_is_read_or_refused_in_one_sentence(processor, tmp_path):
    chance, refused = random.Random(6), []
    smallest_config().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": processor.image_processor.to_dict(), "processor_class": "CLIPProcessor"})
    )
    original = {path.name: path.read_text() for path in tmp_path.iterdir()}
    loaders = {
        "config.json": [GroupViTConfig.from_pretrained],
        "processor_config.json": [GroupViTImageProcessor.from_pretrained],
        "preprocessor_config.json": [GroupViTImageProcessor.from_pretrained],
    }
    names = sorted(name for name in original if name.endswith(".json"))
    for turn in range(240):
        name = names[turn % len(names)]
        hidden = {"preprocessor_config.json": "processor_config.json", "vocab.json": "tokenizer.json"}.get(name)
        if hidden:
            (tmp_path / hidden).unlink()
        content = json.loads(original[name])
        if name == "tokenizer_config.json" and chance.random() < 0.5:
            del content["added_tokens_decoder"]
        (tmp_path / name).write_text(mutated(content, chance))
        for load in loaders.get(name, [CLIPTokenizer.from_pretrained]):
            try:
                loaded = load(tmp_path)
                if isinstance(loaded, CLIPTokenizer):
                    loaded.file_texts()
            except GroupViTError as error:
                refused.append(error)
        for restored in filter(None, (name, hidden)):
            (tmp_path / restored).write_text(original[restored])
    assert len(refused) > 60
    for error in refused:
        assert isinstance(error, CheckpointError)
        assert str(tmp_path) in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("index", [1 << 31, (1 << 20) + 1, -1, 1.5, True, "7", None, 10**19])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_token_ids_out_of_range_are_refused(name, index, processor, tmp_path):
    processor.tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / name).read_text())
    vocab = content["model"]["vocab"] if name == "tokenizer.json" else content
    vocab["a"] = index
    (tmp_path / name).write_text(json.dumps(content))
    if name == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{name} cannot be used as a tokenizer: token 'a' has the id"):
        CLIPTokenizer.from_pretrained(tmp_path)


def test_a_setting_of_a_file_is_blamed_on_the_file_and_one_of_a_caller_is_not(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": None}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be used: model_max_length must be"):
        CLIPTokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="model_max_length must be"):
        CLIPTokenizer(tokenizer_file=tmp_path / "tokenizer.json", model_max_length=None)


def test_a_configuration_is_compared_with_the_weights_before_a_model_of_its_size_is_made(backend, tmp_path):
    models(backend)[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in (
        {"projection_intermediate_dim": 1 << 20},
        {"text_config": config["text_config"] | {"vocab_size": 1 << 20, "num_hidden_layers": 1000}},
        {"projection_dim": 1 << 63},
        {"logit_scale_init_value": 10**400},
        {"vision_config": config["vision_config"] | {"assign_mlp_ratio": [1e308, 1e308]}},
    ):
        text = json.dumps(config | change)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError):
            backend.load(tmp_path)


def test_a_header_is_no_larger_than_tensors_need_and_an_index_a_regular_file(tmp_path):
    length = 9 << 20
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(length.to_bytes(8, "little") + b'{"a":[')
        file.truncate(8 + length)
    with pytest.raises(CheckpointError, match="its header would be 9437184 bytes long"):
        read_header(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="device or a pipe"):
        find_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    for shard in ("x" * 300 + ".safetensors", "../a.safetensors", 5, None):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(CheckpointError, match=r"a shard is a \.safetensors file beside the index"):
            find_weights(tmp_path)


# -- every door --


def test_every_door_knows_the_bundled_model(backend, tmp_path, monkeypatch):
    # Whatever lies in the working directory.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    package = importlib.import_module(f"groupvit_{backend.name}")
    config = GroupViTConfig.from_pretrained("demo")
    assert package.GroupViTModel.from_pretrained("demo").config == config
    for door in ("AutoProcessor", "AutoTokenizer", "AutoImageProcessor"):
        assert getattr(package, door).from_pretrained("demo")
    assert hub.resolve("demo", patterns=["config.json"]) == hub.DEMO_MODEL
    with pytest.raises(CheckpointError, match=r"demo has no config\.json"):
        GroupViTConfig.from_pretrained("./demo")


def test_all_that_a_model_folder_lacks_is_said_at_once_with_the_remedy(backend, processor, tmp_path):
    package = importlib.import_module(f"groupvit_{backend.name}")
    models(backend)[0].save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "processor")
    missing = r"no tokenizer \(tokenizer\.json, or vocab\.json with merges\.txt\) and no image processor"
    with pytest.raises(CheckpointError, match=rf"{missing}.*processor=.*--processor NAME"):
        package.Segmenter.from_pretrained(tmp_path / "model", device="cpu")
    with pytest.raises(CheckpointError, match=missing):
        GroupViTProcessor.from_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json and no model\.safetensors"):
        package.GroupViTModel.from_pretrained(tmp_path / "empty")
    given = package.Segmenter.from_pretrained(
        tmp_path / "model", processor=tmp_path / "processor", device="cpu", labels="cat, couch"
    )
    assert given(np.zeros((16, 16, 3), np.uint8)).label_map.shape == (16, 16)
    with pytest.raises(InputError, match="they belong to different models"):
        package.Segmenter.from_pretrained(tmp_path / "model", processor="demo", device="cpu")


def test_a_run_takes_the_tokenizer_that_its_checkpoint_lacks_from_the_setting(processor, tmp_path):
    smallest_config().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "processor")
    settings = {"model.init_from": str(tmp_path / "model"), "model.tokenizer": str(tmp_path / "processor")}
    recipe = changed(get_recipe("scenes-demo"), settings)
    assert len(start_processor(recipe, {}).tokenizer) == len(processor.tokenizer)
    for tokenizer in ("", str(tmp_path / "model"), str(tmp_path / "nothing")):
        with pytest.raises(
            CheckpointError, match=r"no tokenizer .* and no image processor .*in the setting model\.tokenizer"
        ):
            start_processor(changed(recipe, {"model.tokenizer": tokenizer}), {})


def test_what_cannot_be_written_as_text_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_files(tmp_path, {"a.txt": partial(write_text, text="\ud800")})
    assert visible(tmp_path) == set()
