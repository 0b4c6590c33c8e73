"""The `groupvit` command: what it prints, writes and returns, and how it fails."""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_common import cli
from groupvit_common.errors import InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.image_files import expand, images_in
from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.preprocessing.tokenizer import CLIPTokenizer
from groupvit_common.segmentation.result import Segmentation
from groupvit_common.storage.names import name_key
from groupvit_common.training.recipe import get_recipe
from groupvit_common.training.run import Interrupted, TrainResult
from groupvit_torch.model import GroupViTModel
from groupvit_torch.predictor import Segmenter
from tests.support.paths import ROOT

FIND_SPEC = importlib.util.find_spec
# Two backends' float32 rounding, in a probability.
APART = 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random model with its processor, as a directory."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = CLIPTokenizer.train(["a photo of a cat, a dog and a sofa."] * 9, 540, model_max_length=24)
    GroupViTProcessor(GroupViTImageProcessor(size=32, crop_size=32), tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 24, "eos_token_id": len(tokenizer) - 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "depths": [1, 1], "num_hidden_layers": 2, "patch_size": 8,
              "num_group_tokens": [5, 0], "num_output_groups": [5, 5], "num_attention_heads": 2,
              "image_size": 32}  # fmt: skip
    config = GroupViTConfig(text_config=text, vision_config=vision, projection_dim=8, projection_intermediate_dim=16)
    GroupViTModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(checkpoint, here, capsys):
    """Run the command with the small model; returns (exit code, lines of stdout, lines of stderr)."""

    def command(*arguments, model=checkpoint):
        extra = ["--model", str(model), "--device", "cpu"] if model else []
        try:
            code = cli.main([*map(str, arguments), *extra])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return command


def make_image(path, seed=0, size=(40, 32), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


# segment


def test_segment_writes_what_the_segmenter_says(run, here, checkpoint):
    photo = make_image(here / "my photo é 猫.png")
    code, out, err = run("segment", photo, "--labels", "cat, dog", "--group-map")
    assert (code, err) == (0, [])
    folder = here / "groupvit_out"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        f"my photo é 猫{end}" for end in ("_groups.png", "_labels.png", "_overlay.png", "_segmentation.json")
    )
    expected = Segmenter.from_pretrained(checkpoint, labels="cat, dog", device="cpu")(photo)
    with Image.open(folder / "my photo é 猫_labels.png") as labels:
        np.testing.assert_array_equal(np.asarray(labels), expected.label_map)
    record = json.loads((folder / "my photo é 猫_segmentation.json").read_text(encoding="utf-8"))
    assert record == expected.to_dict()
    assert len(out) == 1
    assert out[0].startswith(f"{photo}: ")
    assert out[0].endswith("_overlay.png")
    assert "%" in out[0]


def test_segment_options_reach_the_segmenter(run, here):
    photo = make_image(here / "a.png")
    (here / "words.txt").write_text("# mine\ndog, hound\n\nsofa\n")
    code, out, _ = run(
        "segment", photo, "--json", "--labels", "cat", "--labels-file", "words.txt", "--background", 1,
        "--background-labels", "wall", "--templates", "7", "--assignment", "soft", "--top-k", 2, "--batch-size", 1,
        "--shorter-side", 64, "--dtype", "bfloat16",
    )  # fmt: skip
    assert code == 0
    record = json.loads(out[0])
    assert [label["name"] for label in record["labels"]] == ["background", "cat", "dog", "sofa"]
    assert record["labels"][0]["probability"] > 0  # that of "wall"


@pytest.mark.parametrize(
    ("flags", "chosen"), [(["--dtype", "int8"], "int8"), (["--fast", "--dtype", "bfloat16"], "bfloat16")]
)
def test_what_computes_fast_is_said_once(run, here, flags, chosen):
    make_image(here / "a.png")
    code, out, err = run("classify", "a.png", "--labels", "red, green", *flags)
    assert code == 0
    assert len(out) == 1
    notes = [line for line in err if line.startswith("groupvit: note: ")]
    assert [line.split()[4] for line in notes] == [chosen]


def test_options_for_better_masks_reach_the_segmenter(run, here, checkpoint, monkeypatch):
    make_image(here / "a.png")
    (here / "sentences.txt").write_text("a {}.\nthe {}.\n")
    made = []
    load = Segmenter.from_pretrained

    def noted(*arguments, **options):
        made.append(load(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(Segmenter, "from_pretrained", noted)
    labels = 'cat|kitten, dog|"an animal, that barks"'
    arguments = ["a.png", "--labels", labels, "--background-labels", "wall", "--backend", "torch"]
    options = [
        "--flip", "--scales", "0.5,1", "--refine", 2, "--foreground", 0.3, "--synonyms", "max",
        "--templates", "sentences.txt", "--window", 16, "--stride", 8, "--temperature", 2, "--batch-size", 3,
        "--top-k", 2, "--assignment", "soft",
    ]  # fmt: skip
    assert run("segment", *arguments, *options)[0] == 0
    assert run("compare", *arguments, *options, "--other", checkpoint)[0] == 0
    assert len(made) == 3
    for segmenter in made:
        assert [(label.words, label.definitions) for label in segmenter.labels] == [
            (("cat", "kitten"), ()), (("dog",), ("an animal, that barks",)), (("wall",), ())
        ]  # fmt: skip
        assert segmenter.templates == ("a {}.", "the {}.")
        assert (segmenter.flip, segmenter.scales, segmenter.refine, segmenter.foreground) == (True, (1.0, 0.5), 2, 0.3)
        assert (segmenter.synonyms, segmenter.window, segmenter.stride, segmenter.temperature) == ("max", 16, 8, 2.0)
        assert (segmenter.batch_size, segmenter.top_k, segmenter.assignment) == (3, 2, "soft")


def test_json_is_all_there_is_on_stdout_and_writes_no_files_unasked(run, here):
    for i in range(3):
        make_image(here / "in" / f"{i}.png", i)
    (here / "in" / "1.png").write_text("no image")
    code, out, err = run("segment", "in", "--labels", "cat, dog", "--json")
    assert code == 1
    records = [json.loads(line) for line in out]
    assert {r["source"] for r in records} == {str(expand(["in"])[i]) for i in range(3)}
    assert [r["source"] for r in records if "error" in r] == [str(expand(["in"])[1])]
    assert len(err) == 2
    assert err[1] == "groupvit: error: 1 of 3 images failed"
    assert sorted(p.name for p in here.iterdir()) == ["in"]
    code, out, err = run("segment", "in/0.png", "--labels", "cat, dog", "--json", "--out", "out")
    assert (code, err) == (0, [])
    files = json.loads(out[0])["files"]
    assert sorted(files) == ["labels", "overlay", "record"]
    assert all((here / file).is_file() for file in files.values())


def test_the_others_are_done_when_some_images_fail(run, here):
    good = [make_image(here / name, size=size) for name, size in [("a.png", (1, 1)), ("b.jpg", (50, 30))]]
    (here / "text.jpg").write_text("hello")
    whole = good[1].read_bytes()
    (here / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (here / "empty").mkdir()
    # Images may also stand behind options.
    names = ["a.png", "missing.png", "text.jpg", "--labels", "cat,dog", "cut.jpg", "no*match", "empty", "b.jpg"]
    names.append("x" * 300)
    code, out, err = run("segment", *names)
    assert code == 1
    assert [line.split(":")[0] for line in out] == ["a.png", "b.jpg"]
    assert all(line.startswith("groupvit: error: ") for line in err)
    for name, line in zip(
        ["missing.png", "no*match", "empty", "x" * 300, "text.jpg", "cut.jpg"], err[:-1], strict=True
    ):
        assert name in line
    assert err[-1] == "groupvit: error: 6 of 8 images failed"


def test_files_of_any_name_are_done(run, here):
    """Bytes that are no UTF-8, control signs, the longest names, names that some file systems take for one."""
    long = "猫" * 83  # with the suffix 253 bytes, of 255
    names = ["caf\udce9", "new\nline", "\x1b[31mred\u202e", "-dash", ".dot", "100%", "[1]", long, long[:-1] + "狗"]
    names += ["É", "é", "e\u0301"]
    made = []
    for name in names:
        with contextlib.suppress(OSError, UnicodeError):  # some file systems take fewer names
            made.append(make_image(here / f"{name}.png"))
    # Those that stand for themselves on a command line.
    given = [f"./{path.name}" for path in made]
    code, out, err = run("segment", *given, "--labels", "cat, dog", "--out", "out", "--show", "pred", "--json")
    assert (code, err) == (0, [])
    records = [json.loads(line) for line in out]
    assert [os.fsencode(record["source"]) for record in records] == [os.fsencode(path.name) for path in made]
    written = [Path(file) for record in records for file in record["files"].values()]
    assert len(set(written)) == len({name_key(str(file)) for file in written}) == 4 * len(made)
    assert all(file.is_file() for file in written)
    for record in records:
        saved = json.loads(Path(record["files"]["record"]).read_text(encoding="utf-8"))
        assert saved["source"] == record["source"]
    code, out, err = run("classify", *given, "--labels", "cat, dog")
    assert (code, len(out), err) == (0, len(made), [])
    result = replace(
        Segmenter.from_pretrained("demo", labels="red", device="cpu")(made[0]), source=f"x/{'y' * 251}.png"
    )
    assert all(path.is_file() for path in result.save(here / "saved").values())


def test_one_image_that_cannot_be_saved_ends_no_others(run, here):
    for name in "abc":
        make_image(here / f"{name}.png")
    (here / "out" / "b_labels.png").mkdir(parents=True)
    code, out, err = run("segment", "a.png", "b.png", "c.png", "--labels", "cat, dog", "--out", "out")
    assert (code, [line.split(":")[0] for line in out]) == (1, ["a.png", "c.png"])
    assert err[0].startswith("groupvit: error: b.png: ")
    assert err[1:] == ["groupvit: error: 1 of 3 images failed"]
    # Whole, and nothing left over.
    names = {path.name for path in (here / "out").iterdir()}
    assert names >= {f"{name}{end}" for name in "ac" for end in ("_labels.png", "_overlay.png", "_segmentation.json")}
    assert not [name for name in names if name.startswith(".")]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), InputError("no")]
)
def test_one_image_that_the_model_cannot_take_ends_no_others(run, here, monkeypatch, error):
    for i in range(5):
        make_image(here / f"{i}.png", i, size=(41 if i == 2 else 40, 32))
    segment = Segmenter._segment
    together = []

    def segment_if_it_can(self, images, labels):
        together.append(len(images))
        if any(image.loaded.image.width == 41 for image in images):
            raise error
        return segment(self, images, labels)

    monkeypatch.setattr(Segmenter, "_segment", segment_if_it_can)
    code, out, err = run("segment", ".", "--labels", "cat, dog", "--json")
    assert (code, together) == (1, [5, 1, 1, 1, 1, 1])
    assert err[0].startswith("groupvit: error: 2.png: ")
    assert err[1:] == ["groupvit: error: 1 of 5 images failed"]
    records = [json.loads(line) for line in out]
    assert [record["source"] for record in records] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert ["error" in record for record in records] == [False, False, True, False, False]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16", "1"])
def test_images_of_any_mode(run, here, mode):
    name = "a.tif" if mode == "CMYK" else "a.png"
    Image.new("RGB", (40, 30), "teal").convert("L" if mode == "I;16" else mode).convert(mode).save(here / name)
    assert run("segment", name, "--labels", "cat, dog")[0] == 0


def test_an_animation_counts_as_its_first_image(run, here):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(here / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(here / "b.png")
    _, out, _ = run("classify", "a.gif", "b.png", "--labels", "cat, dog", "--json")
    assert json.loads(out[0])["labels"] == json.loads(out[1])["labels"]


def test_equal_names_do_not_clobber_one_another_and_inputs_stay(run, here):
    names = ["x/cat.png", "y/cat.png", "y/CAT.jpg", "y/cat-2.png", "out/dog_overlay.png", "out/dog.png"]
    before = {name: make_image(here / name, i).read_bytes() for i, name in enumerate(names)}
    code, out, _ = run("segment", *names, "--labels", "cat, dog", "--out", "out")
    assert code == 0
    overlays = [line.split(" -> ")[1].replace("\\", "/") for line in out]
    assert overlays == [f"out/{stem}_overlay.png" for stem in
                        ("cat", "cat-2", "CAT-3", "cat-2-2", "dog_overlay", "dog-2")]  # fmt: skip
    assert {name: (here / name).read_bytes() for name in names} == before


# Backends


def test_segment_and_classify_with_either_backend(run, here):
    photo = make_image(here / "a.png", size=(200, 160))
    maps, records, shares = [], [], []
    for backend in ("torch", "tf"):
        arguments = (photo, "--labels", "cat, dog, sofa", "--backend", backend)
        code, out, err = run("segment", *arguments, "--out", backend, "--json")
        assert (code, err) == (0, [])
        with Image.open(here / backend / "a_labels.png") as labels:
            maps.append(np.asarray(labels))
        records.append([label["probability"] for label in json.loads(out[0])["labels"]])
        code, out, err = run("classify", *arguments, "--json")
        assert (code, err) == (0, [])
        shares.append([label["probability"] for label in json.loads(out[0])["labels"]])
    assert np.mean(maps[0] == maps[1]) > 0.999
    np.testing.assert_allclose(records[0], records[1], rtol=0, atol=APART)
    np.testing.assert_allclose(shares[0], shares[1], rtol=0, atol=APART)


def test_tensorflow_is_quiet_in_a_terminal(here, checkpoint):
    """Start-up, a command and a first step of training write nothing of their own, and do not import PyTorch."""
    photo = make_image(here / "a.png")
    # A user's environment, not this process's, in which TensorFlow was imported already.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TF_", "KERAS_"))}
    code = """
import sys
from groupvit_common.cli import main
assert main(sys.argv[1:]) == 0
import groupvit_tf
from tests.support.models import smallest_config, smallest_inputs
model = groupvit_tf.TFGroupViTModel(smallest_config())
model.compile("sgd", run_eagerly=True)
model.fit(smallest_inputs(), batch_size=4, verbose=0)
assert "torch" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", code, "segment", photo, "--labels", "cat, dog", "--backend", "tf",
         "--model", checkpoint, "--out", here / "out", "--dtype", "float16"],
        cwd=ROOT, env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, b"")
    (line,) = result.stdout.splitlines()
    assert line.startswith(str(photo).encode())


@pytest.mark.parametrize(
    ("installed", "asked", "message"),
    [
        ((), (), 'needs PyTorch or TensorFlow: pip install "groupvit[torch]" or "groupvit[tf]"'),
        (("keras",), ("--backend", "torch"), 'needs PyTorch: pip install "groupvit[torch]"'),
        (("torch",), ("--backend", "tf"), 'needs TensorFlow: pip install "groupvit[tf]"'),
    ],
)
def test_a_backend_that_is_not_installed(run, here, monkeypatch, installed, asked, message):
    only(installed, monkeypatch)
    make_image(here / "a.png")
    for command in (("segment", "a.png", "--labels", "cat"), ("classify", "a.png", "--labels", "cat")):
        code, out, err = run(*command, *asked)
        assert (code, out, err) == (3, [], [f"groupvit: error: this command {message}"])
    for command in (("demo",), ("train", "scenes-demo", "--out", "runs")):
        assert run(*command, *asked, model=None) == (3, [], [f"groupvit: error: this command {message}"])


def test_the_first_backend_that_is_installed_is_taken(run, here, monkeypatch):
    make_image(here / "a.png")

    def refuse(name):
        raise InputError(f"{name} was taken")

    for name in ("torch", "tf"):
        taken = importlib.import_module(f"groupvit_{name}.predictor").Segmenter
        monkeypatch.setattr(taken, "from_pretrained", lambda *args, name=name, **options: refuse(name))
    for installed, name in ((("torch", "keras"), "torch"), (("torch",), "torch"), (("keras",), "tf")):
        only(installed, monkeypatch)
        assert run("classify", "a.png", "--labels", "cat")[2] == [f"groupvit: error: {name} was taken"]


def only(installed, monkeypatch):
    """Lets the command find only these of the backends' modules."""

    def find_spec(name, *rest):
        return None if name in ("torch", "keras") and name not in installed else FIND_SPEC(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", find_spec)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", ""], "no labels"),
        (["--labels", "cat, Cat"], "twice"),
        ([], "no labels"),
        (["--labels-file", "missing.txt"], "missing.txt"),
        (["--labels", "cat", "--labels-file", "words.txt"], "twice"),
        (["--labels", "cat", "--templates", "nine"], "nine"),
        (["--labels", "cat", "--background", "2"], "2"),
        (["--labels", "cat", "--top-k", "0"], "0"),
        (["--labels", "cat", "--batch-size", "many"], "many"),
        (["--labels", "cat", "--device", "abacus"], "abacus"),
        (["--labels", "cat", "--out", "words.txt"], "words.txt"),
        (["--labels", "cat", "--nonsense"], "--nonsense"),
        (["--labels", 'cat|"it'], "between double quotes"),
        (["--labels", "cat", "--scales", "1,1"], "twice"),
        (["--labels", "cat", "--scales", "0"], "above 0"),
        (["--labels", "cat", "--refine", "-1"], "at least 0"),
        (["--labels", "cat", "--refine", "9999999999"], "at most"),
        (["--labels", "cat", "--foreground", "2"], "between 0 and 1"),
        (["--labels", "cat", "--synonyms", "min"], "min"),
    ],
)
def test_bad_input(run, here, arguments, message):
    make_image(here / "a.png")
    (here / "words.txt").write_text("cat\n")
    (here / "empty").mkdir()
    # The last --device counts.
    model = None if "--device" in arguments else "missing model"
    extra = [] if model else ["--model", "missing model"]
    if "--device" not in arguments:
        model = "missing-model"  # never reached: the request is checked first
    code, out, err = run("segment", "a.png", *arguments, *extra, model=model)
    assert code == 2
    assert out == []
    assert message in err[-1]
    assert "error: " in err[-1]


def test_no_images_left(run, here):
    assert run("segment", "missing.png", "--labels", "cat", model="missing-model") == (
        1, [], ["groupvit: error: there is no file missing.png"],
    )  # fmt: skip


def test_no_such_model(run, here, monkeypatch):
    make_image(here / "a.png")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (here / "empty").mkdir()
    for model in ("./missing", "empty"):
        code, out, err = run("segment", "a.png", "--labels", "cat", model=model)
        assert (code, out, len(err)) == (3, [], 1)
        assert err[0].startswith("groupvit: error: ")
    assert run("compare", "a.png", "--labels", "cat", "--other", "demo", model="./missing")[0] == 3
    assert run("train", "finetune", "--out", "groupvit_out", "--set", "init_from=./missing", model=None)[0] == 3
    assert not (here / "groupvit_out").exists()


def test_images_written_beside_the_model_are_those_of_one_and_a_fault_spares_the_others(run, here, monkeypatch):
    paths = [make_image(here / f"{name}.png", seed) for seed, name in enumerate("abcdefg")]
    threads = threading.active_count()
    # Batches multiply their matrices in another order.
    assert run("segment", *paths, "--labels", "cat, dog", "--out", "all", "--batch-size", 1)[0] == 0
    for path in paths:
        assert run("segment", path, "--labels", "cat, dog", "--out", "each")[0] == 0
    for each in sorted((here / "each").iterdir()):
        assert (here / "all" / each.name).read_bytes() == each.read_bytes()

    save_as = Segmentation.save_as

    def full_disk(result, folder, name, **others):
        if name == "c":
            raise InputError("no space left")
        return save_as(result, folder, name, **others)

    monkeypatch.setattr(Segmentation, "save_as", full_disk)
    code, out, err = run("segment", *paths, "--labels", "cat, dog", "--out", "some")
    assert code == 1
    assert [line.partition(":")[0] for line in out] == [str(path) for path in paths if path.stem != "c"]
    assert "no space left" in "".join(err)
    assert threading.active_count() == threads


def test_a_folder_that_cannot_be_written(run, here, monkeypatch):
    make_image(here / "a.png")
    for flags in (("--out", "a.png/out"), ("--json", "--coco", "a.png/all.json")):
        code, _, err = run(
            "segment", "a.png", "--labels", "cat", *flags, model="./missing"
        )  # before the model is loaded
        assert (code, len(err)) == (2, 1)
        assert "a.png is not a folder" in err[0]

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    code, _, err = run("segment", "a.png", "--labels", "cat", "--out", "out")
    assert (code, err) == (2, ["groupvit: error: cannot write into the folder out: Permission denied"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 3, "out of memory"),
        (torch.OutOfMemoryError(), 3, "out of memory"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 3, 'pip install "groupvit[torch]"'),
        (ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow"), 3, 'pip install "groupvit[tf]"'),
    ],
)
def test_what_goes_wrong_on_the_way(run, here, monkeypatch, error, code, message):
    make_image(here / "a.png")

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(Segmenter, "from_pretrained", fail)
    result = run("segment", "a.png", "--labels", "cat")
    assert result[:2] == (code, [])
    assert len(result[2]) == 1
    assert message in result[2][0]


def test_a_closed_pipe_ends_the_command_quietly(here, checkpoint):
    for i in range(3):
        make_image(here / "in" / f"{i}.png", i)
    command = [sys.executable, "-m", "groupvit_common.cli", "classify", "in", "--labels", "cat, dog"]
    process = subprocess.Popen([*command, "--model", checkpoint], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr as stream:
        assert stream.read() == b""
    assert process.wait() == 141


def test_a_bar_only_on_a_terminal_and_for_many(run, here, monkeypatch):
    for i in range(5):
        make_image(here / f"{i}.png", i)
    assert run("segment", ".", "--labels", "cat, dog")[2] == []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    code, out, err = run("segment", ".", "--labels", "cat, dog")
    assert (code, len(out)) == (0, 5)
    assert "5" in "".join(err)
    assert run("segment", "0.png", "--labels", "cat, dog")[2] == []


# classify and the rest


def test_classify(run, here):
    for i in range(2):
        make_image(here / f"{i}.png", i)
    code, out, err = run("classify", "*.png", "text.txt", "--labels", "cat, dog, sofa")
    assert (code, len(err)) == (1, 2)
    assert [line.split(": ")[0] for line in out] == ["0.png", "1.png"]
    code, out, err = run("classify", "0.png", "--labels", "cat, dog, sofa", "--json")
    (record,) = map(json.loads, out)
    shares = [label["probability"] for label in record["labels"]]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    assert {label["name"] for label in record["labels"]} == {"cat", "dog", "sofa"}


def test_version_and_help(run):
    code, out, _ = run("--version", model=None)
    assert code == 0
    assert out[0].startswith("groupvit ")
    for command in ([], ["segment"], ["classify"], ["demo"], ["train"]):
        code, out, _ = run(*command, "--help", model=None)
        assert code == 0
        assert "exit codes:" in out
    code, _, err = run(model=None)
    assert code == 2
    assert "COMMAND" in err[-1]


def test_train_knows_its_recipes(run):
    code, _, err = run("train", "no-such-recipe", "--out", "x", model=None)
    assert code == 2
    assert "scenes-demo" in err[0]
    code, _, err = run("train", "scenes-demo", model=None)
    assert (code, err) == (2, ["groupvit: error: train needs --out DIR, the folder for the checkpoint"])


def test_train_shows_a_recipe_in_full(run):
    code, out, err = run("train", "scenes-demo", "--set", "learning_rate=0.5", "--show", model=None)
    assert (code, err) == (0, [])
    assert "learning_rate = 0.5" in out
    assert "steps = 4000" in out


@pytest.mark.parametrize("backend", ["torch", "tf"])
def test_train_hands_over_to_the_loop(run, here, monkeypatch, backend):
    train = importlib.import_module(f"groupvit_{backend}.train")
    seen, rank = [], 0

    def pretend(recipe, out_dir, *, resume, log):
        seen.append((recipe, out_dir, resume))
        if resume == "auto":
            raise Interrupted("stopped by SIGTERM", 15, rank)
        log("one step")
        return TrainResult(here / out_dir, {1: 50.0}, {1: 2.0}, {1: 0.5}, (1.0,), 0.1, rank=rank)

    monkeypatch.setattr(train, "train", pretend)
    code, out, err = run("train", "scenes-demo", "--out", "runs", "--seed", "3", "--backend", backend, model=None)
    assert (code, err) == (0, [])
    assert seen == [(get_recipe("scenes-demo", ["run.seed=3"]), "runs", "never")]
    assert out[0] == "one step"
    assert "groupvit segment" in out[-1]
    code, _, err = run("train", "scenes-demo", "--out", "runs", "--resume", "auto", "--backend", backend, model=None)
    assert (code, err) == (143, ["groupvit: error: stopped by SIGTERM"])
    rank = 1  # the first process tells
    assert run("train", "scenes-demo", "--out", "runs", "--backend", backend, model=None) == (0, ["one step"], [])
    resumed = run("train", "scenes-demo", "--out", "runs", "--resume", "auto", "--backend", backend, model=None)
    assert resumed == (143, [], [])


def test_demo(run, here):
    code, out, err = run("demo", "--out", "demo", model=None)
    assert (code, err) == (0, [])
    text = "\n".join(out)
    assert text.count("IoU") >= 12
    apart = re.search(r"^PyTorch and TensorFlow label (.*)% of the pixels alike; (.*) is the largest", text, re.M)
    assert 99.99 <= float(apart[1]) <= 100
    assert 0 < float(apart[2]) < APART
    assert str((here / "demo").resolve()) in text
    for name in ("colours_64x64", "colours_160x96", "textures_64x64", "shapes_160x96"):
        for end in (".png", "_overlay.png", "_labels.png", "_segmentation.json"):
            assert (here / "demo" / f"{name}{end}").is_file()
    with Image.open(here / "demo" / "overview.png") as overview:
        assert overview.width > 1000
    first = (here / "demo" / "overview.png").read_bytes()
    code, alone, _ = run("demo", "--out", "demo", "--backend", "torch", model=None)
    assert code == 0
    assert [line for line in out if line not in alone] == [out[0], apart[0] + " difference of a probability."]
    assert (here / "demo" / "overview.png").read_bytes() == first


def test_demo_shows_no_image_of_the_training_set(run):
    code, _, err = run("demo", "--seed", "0", model=None)
    assert code == 2
    assert "trained" in err[0]


# Files


def test_folders_patterns_and_names(here):
    for name in ("b.png", "a.JPEG", "c.txt", "in/d.webp", "[e].png"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(b"")
    assert [p.name for p in images_in(here)] == ["[e].png", "a.JPEG", "b.png"]
    assert [p.as_posix() for p in expand(["**/*.webp", "b.png", "*.png", "[e].png", "c.txt", "gone.png"])] == [
        "in/d.webp", "b.png", "[e].png", "c.txt", "gone.png",
    ]  # fmt: skip
