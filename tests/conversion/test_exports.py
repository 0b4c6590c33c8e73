"""Exported files answer what the model answers, for images and texts of any number and size."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conversion.exports import agreement
from conversion.exports.export import export, licence
from conversion.exports.formats import FORMATS, get_format
from conversion.exports.runtimes import open_file
from groupvit_common.checkpoints.hub import DEMO_MODEL
from groupvit_common.cli import main
from groupvit_common.data.scenes import make_scene
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.resample import resize_matrix
from groupvit_common.preprocessing.image_processor import CLIPImageProcessor
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.parts import PARTS, BakedLabels, ProgramSettings, parse_parts
from groupvit_common.tensorflow_logging import litert_start_up
from groupvit_torch import GroupViTModel, Segmenter
from groupvit_torch.vision import bicubic
from tests.support.models import smallest_config, smallest_inputs
from tests.support.paths import ROOT

LABELS = "red, green, blue, grass"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exports") / "model"
    torch.manual_seed(0)
    GroupViTModel(smallest_config()).save_pretrained(directory)
    return directory


def model_of(backend: str, checkpoint: Path) -> Any:
    return importlib.import_module(f"groupvit_{backend}").GroupViTModel.from_pretrained(checkpoint)


@pytest.mark.parametrize("n_in", [1, 3, 14])
def test_bicubic_of_any_size_is_that_of_the_matrix(n_in):
    x = torch.randn(2, n_in, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for n_out in (1, 2, 3, 5, 14, 15, 97):
        wanted = torch.einsum("ri,bic->brc", torch.tensor(resize_matrix(n_in, n_out, "bicubic")), x)
        # The same numbers, of float64, summed in another order.
        torch.testing.assert_close(bicubic(x, 1, n_out), wanted, rtol=1e-13, atol=1e-13)


def test_the_torch_programs_are_the_model_and_nothing_more(checkpoint, tmp_path):
    """Three image sizes, two batch sizes, three lengths of texts; the text encoder holds no image tower."""
    seen: dict[str, Any] = {}
    # The segmenter holds the image encoder.
    done = export(
        checkpoint, tmp_path / "out", "torch-export", parts="text,segment",
        written=lambda name, path, found: seen.update({name: found}),
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "export_report.json", "segmenter.pt2", "text_encoder.pt2",
    ]  # fmt: skip
    assert len({each.sizes for each in seen["segmenter"]}) == 6
    assert len({each.sizes for each in seen["text_encoder"]}) == 6
    assert {each.output for each in seen["segmenter"]} == set(PARTS["segment"].outputs)
    assert all(each.passed for each in done.agreements)
    report = json.loads(done.report.read_text())
    assert set(report["files"]) == {path.name for path in done.files.values()}
    assert len(report["verification"]) == len(done.agreements)
    with zipfile.ZipFile(tmp_path / "out" / "text_encoder.pt2") as archive:
        # Nothing of the folders of this machine.
        (program,) = [archive.read(name) for name in archive.namelist() if name.endswith("model.json")]
    assert b"get_attr" in program or b"aten" in program
    assert b"File " not in program
    saved = torch.export.load(tmp_path / "out" / "text_encoder.pt2").state_dict
    assert not [name for name in saved if "vision" in name or "visual" in name]

    run, metadata = open_file(get_format("torch-export"), done.files["text_encoder"])
    assert (metadata["part"], metadata["patch_size"], metadata["image_mean"]) == ("text_encoder", 8, None)
    inputs = smallest_inputs()
    found = run({name: inputs[name] for name in ("input_ids", "attention_mask")})["text_embeds"]
    with torch.no_grad():
        given = {name: torch.from_numpy(array) for name, array in inputs.items()}
        wanted = model_of("torch", checkpoint)(**given).text_embeds.numpy()
    # float32, summed in another order.
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "tf"])
def test_the_segmenter_labels_pixels_as_the_model_says(checkpoint, backend):
    """Labels by a second implementation: NumPy's, from the image encoder's outputs."""
    model, code = model_of(backend, checkpoint), importlib.import_module(f"groupvit_{backend}.export")
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, 3, 40, 24), np.float32)
    embeds = rng.standard_normal((4, model.config.projection_dim), np.float32)
    values, threshold = np.array([1, 0, 2, 3]), 0.3
    baked = BakedLabels(("a",) * 4, embeds, values, threshold)
    image = code.run(model, PARTS["image"], None, {"pixel_values": pixels})
    np.testing.assert_allclose(np.linalg.norm(image["group_embeds"], axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(image["grouping"].sum(1), 1, atol=1e-5)
    down, across = (resize_matrix(n, 8 * n) for n in image["grouping"].shape[2:])
    groups = (down @ image["grouping"] @ across.T).argmax(1)
    unit = embeds / np.linalg.norm(embeds, axis=-1, keepdims=True)
    logits = min(float(np.exp(np.asarray(state(model)))), 100.0) * image["group_embeds"] @ unit.T
    affinity = np.exp(logits - logits.max(-1, keepdims=True))
    affinity = (affinity / affinity.sum(-1, keepdims=True)) ** 2
    for assignment in ("hard", "soft"):
        model.config.segmentation_assignment = assignment
        found = code.run(model, PARTS["segment"], None, {"pixel_values": pixels, "text_embeds": embeds})
        inside = code.run(model, PARTS["segment"], ProgramSettings(labels=baked), {"pixel_values": pixels})
        for index in range(2):
            if assignment == "hard":
                scores = affinity[index].T[:, groups[index]]  # [L, H, W]
            else:
                maps = np.einsum("gl,ghw->lhw", affinity[index], image["grouping"][index])
                scores = down @ maps @ across.T
            best, score = scores.argmax(0), scores.max(0)
            # Pixels between two groups or labels may go to either by rounding: none does here.
            assert (found["group_map"][index] == groups[index]).all()
            assert (found["label_map"][index] == best).all()
            np.testing.assert_allclose(found["scores"][index], score, rtol=1e-4)
            shown = np.where(score < min(threshold, affinity[index].max()), 0, values[best])
            assert (inside["label_map"][index] == shown).all()


@pytest.fixture(scope="module", params=["torch", "tf"])
def demo(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(f"groupvit_{request.param}").Segmenter.from_pretrained("demo")


def test_a_program_takes_images_as_they_are_and_segments_as_the_segmenter(demo):
    """Resized to other sizes than the image's, to the longest that is allowed, and by options of every kind. No pixel
    is in the middle between two patches."""
    package = type(demo).__module__.partition(".")[0]
    code = importlib.import_module(f"{package}.export")
    cases: list[tuple[dict[str, Any], tuple[int, int]]] = [
        ({"assignment": "hard", "temperature": 2.0, "top_k": 2, "background": 0.2, "shorter_side": 32}, (30, 336)),
        ({"shorter_side": 64}, (97, 150)),
        ({"templates": "seven", "synonyms": "max", "shorter_side": 48}, (51, 48)),
    ]
    # Keras traces each: one with everything in it.
    for options, (height, width) in cases[: 1 if package == "groupvit_tf" else None]:
        demo.options = SegmentationOptions(**options)
        demo.set_labels("red | crimson, green, blue, grass", "grass")
        settings = ProgramSettings(
            options=demo.options, labels=demo.baked_labels(), image_processor=demo.image_processor
        )
        image = make_scene(0, 1, 1, (max(48, height), max(48, width))).image[:height, :width]
        found = code.run(demo.model, PARTS["segment"], settings, {"images": image[None]})
        wanted = demo(image)
        assert settings.labels.names == tuple(wanted.labels)
        # A value in ten thousand of the resized image is one step away: it moves pixels between two groups at most.
        assert (found["label_map"][0] != wanted.label_map).mean() < 2e-3
        assert len(np.unique(wanted.label_map)) > 1


@pytest.mark.parametrize("backend", ["torch", "tf"])
def test_images_are_resized_as_pillow_does(backend):
    code = importlib.import_module(f"groupvit_{backend}.export")
    rng = np.random.default_rng(0)
    for n_in, n_out in ((7, 64), (64, 7), (300, 128), (128, 128), (1, 16), (1000, 24)):
        line = rng.integers(0, 256, (1, n_in), np.uint8)
        wanted = np.asarray(Image.fromarray(line).resize((n_out, 1), Image.Resampling.BICUBIC))
        device = (torch.device("cpu"),) if backend == "torch" else ()
        matrix = np.asarray(code.pillow_matrix(n_in, n_out, *device))
        # Pillow's weights are whole numbers of 22 bits: a sum between two levels may go to either.
        assert np.abs(np.floor((matrix @ line[0]).clip(0, 255) + 0.5) - wanted[0]).max() <= 1
        assert np.abs((matrix @ line[0]).clip(0, 255) - wanted[0]).max() < 0.501


def test_a_package_names_no_folders_of_this_machine(tmp_path):
    from groupvit_torch.export import hide_folders

    package = tmp_path / "segmenter.pt2"
    with zipfile.ZipFile(package, "w") as archive:
        for name in ("m/a.cpp", "m/a.so", "m/a.json"):
            archive.writestr(name, b"\x00/home/me/torch/x.h\x00")
    hide_folders(package, ["/home/me"])
    with zipfile.ZipFile(package) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    assert found == {
        "m/a.cpp": b"", "m/a.so": b"\x00......../torch/x.h\x00", "m/a.json": b"\x00/home/me/torch/x.h\x00",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["segmenter.pt2"]


def test_a_product_makes_the_patches_of_the_convolution(checkpoint):
    from groupvit_torch.export import PatchProduct

    patches = model_of("torch", checkpoint).vision_model.embeddings.patch_embeddings
    pixels = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    # float32, summed in another order.
    torch.testing.assert_close(PatchProduct(patches)(pixels), patches(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "tf"])
def test_the_size_for_the_model_is_the_image_processors(backend):
    code = importlib.import_module(f"groupvit_{backend}.export")
    for side, patch in ((448, 16), (128, 8), (30, 8)):
        processor = CLIPImageProcessor().for_segmentation(side, patch, longer_side=4 * side)
        patches = (
            code.Preprocessed(torch.nn.Identity(), processor)._patches
            if backend == "torch"
            else lambda height, width, processor=processor: code._patches(height, width, processor)
        )
        for height, width in ((1, 1), (480, 640), (37, 512), (3000, 11), (100, 399), (100, 401), (229, 231)):
            rows, columns = patches(height, width)
            assert (patch * int(rows), patch * int(columns)) == processor.resized_size(height, width)


def state(model: Any) -> Any:
    return model.logit_scale.detach() if isinstance(model, torch.nn.Module) else model.logit_scale


def test_a_file_that_is_not_the_model_is_not_kept(checkpoint, tmp_path, monkeypatch):
    from groupvit_torch import export as code

    def another(model: Any, part: Any, settings: Any, inputs: Any) -> Any:
        return {name: value + 1e-3 for name, value in run(model, part, settings, inputs).items()}

    run = code.run
    monkeypatch.setattr(code, "run", another)
    with pytest.raises(CheckpointError, match=r"text_encoder\.pt2 is not the model: its text_embeds for 1 x 3 differs"):
        export(checkpoint, tmp_path / "out", "torch-export", parts=["text"])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_whatever_a_writer_says(checkpoint, tmp_path, monkeypatch):
    from groupvit_torch import export as code

    def write(*arguments: Any) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(code, "write", write)
    with pytest.raises(RuntimeError, match="basic_ios"):
        export(checkpoint, tmp_path / "out", "torch-export", parts="text")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(CheckpointError, match="out cannot be written: No space left on device"):
        export(checkpoint, tmp_path / "out", "torch-export", parts="text")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said_in_a_sentence(checkpoint, tmp_path, monkeypatch):
    def refused(message: str, to: str = "torch-export", **options: Any) -> None:
        with pytest.raises((InputError, CheckpointError), match=message):
            export(options.pop("source", checkpoint), options.pop("out", tmp_path / "out"), to, **options)

    refused("exported to one of onnx, openvino, .*, got 'coreml'", to="coreml")
    refused("aoti is written in float32 here, not in int8", to="aoti", dtype="int8")
    refused("parts must be some of image, text, segment, each once, got 'image, images'", parts="image, images")
    refused("parts must be .* got 'none'", parts=[])
    refused("add segment to parts", parts="image", labels=LABELS)
    refused("a background needs labels", background=0.5)
    refused("templates is about labels in the segmenter: pass labels", templates="seven")
    refused("assignment must be .hard. or .soft., got 'firm'", assignment="firm")
    refused("top_k is about the segmenter: add segment", parts="image", top_k=3)
    refused("sees an image once, as a whole: leave window out", window=64)
    refused("no segmentation option 'assignement'", assignement="hard")
    refused("shorter_side is about images that the file resizes: pass preprocess", shorter_side=64)
    refused("preprocess is about images: add image or segment", parts="text", preprocess=True)
    refused("for preprocess: name a checkpoint that has them", preprocess=True)
    refused("for labels: name a checkpoint that has them", labels=LABELS)
    refused("written as a folder, and 'model.onnx' ends as a file does", out=tmp_path / "model.onnx")
    refused("missing does not exist", source=tmp_path / "missing")
    inside = tmp_path / "exported" / "image_encoder"
    shutil.copytree(checkpoint, inside)
    refused("holds the source itself", source=inside, out=tmp_path / "exported", overwrite=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    refused("is there already; pass overwrite")
    refused(r"holds what no export writes \(thesis.txt\)", overwrite=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else name)
    refused(r'onnx needs onnx: pip install "groupvit\[onnx\]"', to="onnx", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_without_groups_has_no_segmenter():
    with pytest.raises(InputError, match="no groups to segment by"):
        parse_parts("segment", has_groups=False, has_labels=False)
    assert [part.name for part in parse_parts("text, image", has_groups=False, has_labels=False)] == [
        "image_encoder", "text_encoder",
    ]  # fmt: skip


def test_differences_are_those_of_the_values_or_the_share_of_pixels():
    part, config = PARTS["segment"], smallest_config()

    def source(inputs: Any) -> Any:
        shape = (len(inputs["pixel_values"]), *inputs["pixel_values"].shape[2:])
        maps = np.zeros(shape, np.int32)
        return {"label_map": maps, "group_map": maps, "scores": np.ones(shape, np.float32)}

    def file(inputs: Any) -> Any:
        found = source(inputs)
        other = found["group_map"].copy()
        other[:, 0] = 1
        # Where the group is another, so may its score be.
        return found | {"group_map": other, "scores": np.where(other, 0.5, 1.00002).astype(np.float32)}

    found = list(agreement.compare(part, config, source, file, "float32", fixed=False))
    assert {each.sizes for each in found} == {
        f"{count} x {size}" for count in (1, 3) for size in ("16 x 16", "40 x 24", "32 x 56")
    }
    by_output = {each.output: each for each in found if each.sizes == "1 x 40 x 24"}
    assert by_output["label_map"].difference == 0
    assert by_output["group_map"].difference == 1 / 40
    assert not by_output["group_map"].passed
    assert by_output["scores"].difference == pytest.approx(2e-5, rel=0.01)
    assert by_output["scores"].passed


def test_of_fewer_bits_a_near_tie_may_move_a_group_but_not_most():
    part, config = PARTS["image"], smallest_config()

    def file(moved: int) -> Any:
        def run(inputs: Any) -> Any:
            count = len(inputs["pixel_values"])
            groups = np.tile(np.eye(6, dtype=np.float32)[:4], (count, 1, 1))
            groups[:, :moved] = np.eye(6)[5]
            mean = groups.mean(1)
            embeds = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
            return {"image_embeds": embeds, "group_embeds": groups, "grouping": np.ones((count, 4, 2, 2), np.float32)}

        return run

    def failed(dtype: str, moved: int) -> set[str]:
        found = agreement.compare(part, config, file(0), file(moved), dtype, fixed=True)
        return {each.output for each in found if not each.passed}

    assert not failed("int8", 1)
    assert not failed("float16", 1)
    assert failed("float32", 1) == {"image_embeds", "group_embeds"}
    assert "group_embeds" in failed("int8", 3)


def test_the_command_says_what_it_wrote(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", str(checkpoint), str(out), "--to", "torch-export", "--parts", "text", "--no-verify"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "text_encoder.pt2: " in printed
    assert "not verified" in printed
    assert main(arguments) != 0
    assert "is there already; pass overwrite (--overwrite)" in capsys.readouterr().err
    # The authors' file, which comes without tokenizer and image processor.
    arguments[1] = str(ROOT / "tests" / "reference" / "nvlabs" / "nv_two_stage" / "checkpoint.pth")
    assert main([*arguments, "--overwrite"]) == 0
    assert json.loads((out / "export_report.json").read_text())["source"] == "checkpoint.pth"


def test_litert_starts_quietly_but_its_warnings_are_shown(capfd):
    with litert_start_up():
        # As its C++ writes.
        os.write(2, b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\nWARNING: no memory\n")
    assert capfd.readouterr().err == "WARNING: no memory\n"


def test_a_format_that_fails_does_not_end_a_benchmark(checkpoint, tmp_path, capsys):
    threads = torch.get_num_threads()
    (tmp_path / "thesis").mkdir()
    code = main([
        "benchmark", str(checkpoint), "--formats", f"aoti:float16,torch-export,{tmp_path / 'thesis'}", "--models",
        "torch", "--parts", "text", "--batch", "3", "--threads", "1", "--rounds", "2", "--json",
    ])  # fmt: skip
    assert code == 1
    assert torch.get_num_threads() == threads
    found = json.loads(capsys.readouterr().out)
    assert (found["threads"], found["rounds"]) == (1, 2)
    model, file, aoti, folder = found["rows"]
    assert (model["program"], file["program"]) == ("PyTorch", "torch-export")
    assert model["part"] == file["part"] == "text_encoder"
    assert model["inputs"] == file["inputs"] == "3 x 12"
    assert (model["ratio"], model["difference"], model["bytes"]) == (1, 0, None)
    assert file["milliseconds"] > 0
    assert file["bytes"] > 1000
    # float32, summed in another order.
    assert file["difference"] < 1e-5
    assert aoti["error"].startswith("aoti is written in float32 here, not in float16")
    assert folder["program"] == str(tmp_path / "thesis")
    assert "export_report.json" in folder["error"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("to", [row.name for row in FORMATS])
def test_every_format_is_the_bundled_model(to, dtype, tmp_path):
    row = get_format(to)
    if dtype not in row.dtypes:
        pytest.skip(f"{to} has no {dtype}")
    done = export("demo", tmp_path / "out", to, dtype=dtype)
    assert all(each.passed for each in done.agreements)
    for name, path in done.files.items():
        _, metadata = open_file(row, path)
        assert metadata["part"] == name


@pytest.mark.slow
@pytest.mark.parametrize("to", [row.name for row in FORMATS])
def test_labels_and_preprocessing_inside_are_those_of_the_segmenter(to, tmp_path):
    """Of scenes that are resized, every label is the same but for rounding."""
    options: dict[str, Any] = {"labels": LABELS, "background_labels": "grass", "background": 0.2, "top_k": 3}
    row = get_format(to)
    done = export("demo", tmp_path / "out", to, parts="segment", preprocess=True, **options)
    run, metadata = open_file(row, done.files["segmenter"])
    assert metadata["inputs"] == {"images": "uint8 [B, H, W, 3]"}
    assert metadata["licence"] == "apache-2.0"
    segmenter = Segmenter.from_pretrained("demo", **options)
    for index, size in enumerate(((128, 160), (97, 301), (205, 64))):
        image = make_scene(0, index, 1, size).image
        # One value in ten thousand is one step of 255 away: pixels between two groups may change.
        assert (run({"images": image[None]})["label_map"][0] != segmenter(image).label_map).mean() < 1e-3


@pytest.mark.slow
def test_the_recipe_for_any_words_is_that_of_the_segmenter(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```python\n((?:(?!```).)*?Tokenizer\.from_file.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO_MODEL, "model")
    export("model", "exported", "onnx", parts="text,segment", preprocess=True, verify=False)
    image = make_scene(0, 1, 1, (97, 150)).image
    Image.fromarray(image).save("photo.jpg")
    found: dict[str, Any] = {}
    exec(recipe, found)
    segmenter = Segmenter.from_pretrained("demo", labels=found["labels"])
    assert (found["label_map"] != segmenter("photo.jpg").label_map).mean() < 1e-3


def test_the_licence_is_the_model_cards(tmp_path):
    assert licence(DEMO_MODEL) == "apache-2.0"
    assert licence(tmp_path) == "unknown"
    for text, wanted in (
        ("---\nlicense: other\nlicense_name: weights-only\n---\n", "weights-only"),
        ("---\ntags: [a]\nlicense: 'cc-by-nc-4.0'  # of the weights\n---\nText\n", "cc-by-nc-4.0"),
        ("---\ntags: [a]\n---\nlicense: mit\n", "unknown"),
        ("license: mit\n", "unknown"),
    ):
        (tmp_path / "README.md").write_text(text)
        assert licence(tmp_path / "model.pth") == wanted
