"""`groupvit segment` with clips, lists of files, several processes, and results that are there."""

from __future__ import annotations

import io
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from groupvit_common import cli
from groupvit_common.cli.shares import Share
from groupvit_common.errors import InputError
from groupvit_common.segmentation import clips
from groupvit_torch.predictor import Segmenter
from tests.support.clips import moving_scene, read_clip, write_animation, write_clip

LABELS = ("--labels", "red, green, blue", "--background-labels", "grass, water")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def ready() -> Segmenter:
    return Segmenter.from_pretrained("demo", device="cpu")


@pytest.fixture
def run(here: Path, capsys: Any, monkeypatch: Any, ready: Segmenter) -> Any:
    """Runs the command with the bundled model, which is loaded once: (exit code, lines of stdout, of stderr)."""

    def loaded(cls: Any, model: Any, **options: Any) -> Any:
        for name in ("processor", "device", "dtype", "fast"):
            options.pop(name)
        return Segmenter(ready.model, ready.processor, shorter_side=64, **options)

    monkeypatch.setattr(Segmenter, "from_pretrained", classmethod(loaded))

    def command(*arguments: Any) -> tuple[Any, list[str], list[str]]:
        try:
            code: Any = cli.main(["segment", *map(str, arguments), "--model", "demo", "--device", "cpu"])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return command


@pytest.fixture(scope="module")
def clip(tmp_path_factory: Any) -> bytes:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", moving_scene(2, 6, (48, 64))).read_bytes()


def write_photo(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 56, 3), np.uint8)).save(path)
    return path


def names_in(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_photos_and_clips_in_one_call(run: Any, here: Path, clip: bytes) -> None:
    (here / "a.mp4").write_bytes(clip)
    write_photo(here / "a.png")
    write_animation(here / "b.gif", moving_scene(1, 2, (48, 64)), [100, 100])
    code, out, err = run("a.mp4", "a.png", "b.gif", *LABELS, "--smoothing", "0.5", "--label-maps", "png", "--json",
                         "--out", "out")  # fmt: skip
    assert (code, err) == (0, [])
    records = {record["source"]: record for record in map(json.loads, out)}
    assert list(records) == ["a.png", "a.mp4", "b.gif"]
    assert records["a.mp4"]["files"] == {
        "overlay": "out/a_overlay.mp4", "legend": "out/a_overlay.png", "record": "out/a_segmentation.json",
        "labels": "out/a_labels",
    }  # fmt: skip
    assert records["a.png"]["files"]["overlay"] == "out/a-2_overlay.png"
    assert (records["a.mp4"]["smoothing"], records["a.mp4"]["frames"]) == (0.5, 6)
    assert names_in("out/a_labels") == [f"{i:06d}.png" for i in range(6)]
    assert read_clip(Path("out/a_overlay.mp4"))[0] == read_clip(Path("a.mp4"))[0]
    assert read_clip(Path("out/b_overlay.mp4"))[0] == [0, Fraction(1, 10)]


def test_label_maps_do_not_replace_a_folder_of_inputs(run: Any, here: Path, clip: bytes) -> None:
    (here / "a.mp4").write_bytes(clip)
    before = write_photo(here / "a_labels" / "000000.png").read_bytes()
    code, out, _ = run("a.mp4", "a_labels", *LABELS, "--label-maps", "png", "--max-frames", "1", "--out", ".")
    assert (code, len(out)) == (0, 2)
    assert (here / "a_labels" / "000000.png").read_bytes() == before
    assert names_in("a-2_labels") == ["000000.png"]


def test_only_printed(run: Any, here: Path, clip: bytes) -> None:
    (here / "film").write_bytes(clip)
    code, out, err = run("film", *LABELS, "--json", "--max-frames", 2)
    assert (code, err) == (0, [])
    (record,) = map(json.loads, out)
    assert (record["over_time"]["frame"], record["files"], names_in(here)) == ([0, 1], {}, ["film"])
    code, out, err = run("film", *LABELS, "--every", 4)
    assert (code, err) == (0, [])
    assert out[0].startswith("film: 2 frames, ")
    assert out[0].endswith(" -> groupvit_out/film_overlay.mp4")


@pytest.mark.filterwarnings("default")  # printed as the command prints them
def test_a_folder_means_its_images(run: Any, here: Path, clip: bytes) -> None:
    write_photo(here / "in" / "a.png")
    (here / "in" / "b.mp4").write_bytes(clip)
    (here / "films").mkdir()
    (here / "films" / "c.mp4").write_bytes(clip)
    code, out, err = run("in", *LABELS)
    assert (code, len(out)) == (0, 1)
    assert err == [
        'groupvit: warning: left out in the folder in: 1 video; name clips themselves, as with the pattern "in/*.mp4"'
    ]
    assert run("in/*.mp4", *LABELS, "--out", "in")[0] == 0
    # The overlay is a result, and no clip to work on.
    code, out, err = run("in/*.mp4", *LABELS)
    assert (code, len(out)) == (0, 1)
    assert "left out for the pattern in/*.mp4: 1 result of an earlier run" in err[0]
    code, out, err = run("films", *LABELS)
    assert (code, out) == (2, [])
    assert "no images in the folder films, but 1 video: name clips themselves" in err[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--smoothing", "1"), "--smoothing: must be less than 1, which would keep the scores of the first frame"),
        (("--smoothing", "-0.1"), "--smoothing: must be a number between 0 and 1"),
        (("--every", "0"), "--every: must be a whole number of at least 1"),
        (("--show", "pred"), "--show"),
        (("--coco", "x.json"), "--coco is for images, and clip.mp4 is a clip: run the command for one kind only"),
        (("--label-maps", "npz", "--json"), "--label-maps writes files: with --json it needs --out DIR"),
        (("--skip-existing", "--json"), "--skip-existing looks for files: with --json it needs --out DIR"),
        (("--max-pixels", "100"), "clip.mp4 has frames of 64x48 pixels, more than max_pixels=100"),
    ],
)
def test_options_that_cannot_be_used(flags: Any, message: str, run: Any, here: Path, clip: bytes) -> None:
    (here / "clip.mp4").write_bytes(clip)
    code, out, err = run("clip.mp4", *LABELS, *flags)
    assert code in (1, 2)
    assert [line for line in out if "error" not in line] == []
    assert len(err) == 1
    assert message in err[0]
    assert names_in(here) in (["clip.mp4"], ["clip.mp4", "groupvit_out"])


def test_options_of_clips_without_one(run: Any, here: Path) -> None:
    write_photo(here / "a.png")
    code, _, err = run("a.png", *LABELS, "--every", 2)
    assert (code, err) == (2, ["groupvit: error: --every is for clips, and there is none among the inputs"])


def test_without_pyav(run: Any, here: Path, clip: bytes, monkeypatch: Any) -> None:
    (here / "clip.mp4").write_bytes(clip)
    monkeypatch.setitem(sys.modules, "av", None)
    code, _, err = run("clip.mp4", *LABELS)
    assert (code, err) == (2, ["groupvit: error: videos need PyAV: pip install 'groupvit[video]'"])


def test_faults_of_one_clip_leave_the_others(run: Any, here: Path, clip: bytes) -> None:
    (here / "good.mp4").write_bytes(clip)
    (here / "text.mp4").write_text("hello")
    frames = [np.random.default_rng(i).integers(0, 255, (48, 64, 3), np.uint8) for i in range(12)]
    whole = write_clip(here / "cut.mp4", frames, container_options={"movflags": "+faststart"})
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    code, out, err = run("good.mp4", "text.mp4", "none.mp4", "cut.mp4", *LABELS)
    assert code == 1
    assert [line.split(":")[0] for line in out] == ["good.mp4", "cut.mp4"]
    assert len(err) == 4
    assert "there is no file none.mp4" in err[0]
    assert "text.mp4 is not a video" in err[1]
    assert "cut.mp4: only " in err[2]
    assert "what there is was segmented" in err[2]
    assert err[3] == "groupvit: error: 3 of 4 images and clips failed"
    count = len(read_clip(Path("groupvit_out/cut_overlay.mp4"))[0])
    assert 2 < count < 10
    # It is tried anew, the good one is not.
    code, out, err = run("good.mp4", "cut.mp4", *LABELS, "--skip-existing")
    assert (code, len(out)) == (1, 1)


def test_an_interrupted_run_leaves_no_half_file(run: Any, here: Path, clip: bytes, monkeypatch: Any) -> None:
    (here / "clip.mp4").write_bytes(clip)
    decoded = clips._Video._decoded

    def interrupted(self: Any) -> Any:
        for number, frame in enumerate(decoded(self)):
            if number == 3:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(clips._Video, "_decoded", interrupted)
    code, _, err = run("clip.mp4", *LABELS, "--label-maps", "png")
    assert (code, err) == (130, ["groupvit: error: interrupted"])
    assert names_in("groupvit_out") == []


# -- lists of files --


def test_names_from_a_file(run: Any, here: Path, monkeypatch: Any) -> None:
    for name in ("a.png", "é b.png", "c.png"):
        write_photo(here / name)
    (here / "list.txt").write_bytes("\ufeffa.png\r\n\r\né b.png\r\n".encode())
    code, out, _ = run("--from-file", "list.txt", *LABELS, "--json")
    assert (code, [json.loads(line)["source"] for line in out]) == (0, ["a.png", "é b.png"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("c.png\0é b.png\0".encode())))
    code, out, _ = run("c.png", "--from-file", "-", *LABELS, "--json")
    assert (code, [json.loads(line)["source"] for line in out]) == (0, ["c.png", "é b.png"])
    (here / "empty.txt").write_text("\n")
    assert run("--from-file", "empty.txt", *LABELS)[2] == [
        "groupvit: error: --from-file empty.txt names no files: one a line is expected"
    ]
    assert run("--from-file", "none.txt", *LABELS)[2] == [
        "groupvit: error: --from-file none.txt cannot be read: No such file or directory"
    ]


# -- several processes, and results that are there --


def test_processes_divide_the_inputs(run: Any, here: Path, clip: bytes, monkeypatch: Any) -> None:
    for name in "abcd":
        write_photo(here / "in" / f"{name}.png", ord(name))
    for name in "xy":
        (here / f"{name}.mp4").write_bytes(clip)
    arguments = ("in", "x.mp4", "y.mp4", "none.png", *LABELS, "--out", "out")
    lines, notes = [], []
    for rank in (0, 2, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        code, out, err = run(*arguments)
        lines.append([line.split(":")[0] for line in out])
        notes += err
        # What is not there is the first one's to report.
        assert code == (rank == 0)
    assert lines == [["in/a.png", "in/d.png", "x.mp4"], ["in/c.png"], ["in/b.png", "y.mp4"]]
    assert [note.removeprefix("groupvit: note: ") for note in notes if "note: " in note] == [
        "rank 0 of 3: 3 of 6 inputs", "rank 0 of 3: 3 done, 0 there already, 1 failed",
        "rank 2 of 3: 1 of 6 inputs", "rank 2 of 3: 1 done, 0 there already, 0 failed",
        "rank 1 of 3: 2 of 6 inputs", "rank 1 of 3: 2 done, 0 there already, 0 failed",
        "all 3 ranks: 6 done, 0 there already, 1 failed",
    ]  # fmt: skip
    assert not any(name.startswith(".") for name in names_in("out"))
    # The names do not depend on the number of processes.
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    before = names_in("out")
    assert run(*arguments, "--skip-existing")[1] == []
    assert names_in("out") == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for flag in (("--sheet",), ("--coco", "x.json")):
        code, _, err = run("in", *LABELS, *flag)
        assert code == 2
        assert "needs the results of all images, and rank 1 of 2 has some of them" in err[0]


def test_one_damaged_image_does_not_end_the_others_of_torchrun(run: Any, here: Path, monkeypatch: Any) -> None:
    """`torchrun` ends all processes when one fails."""
    write_photo(here / "b.png")
    (here / "a.png").write_text("hello")
    codes = {}
    for name, value in {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        codes[rank] = run("a.png", "b.png", *LABELS)[0]
    # The last one fails for all.
    assert codes == {0: 0, 1: 1}


@pytest.mark.parametrize("values", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "many"}])
def test_ranks_that_cannot_be(values: dict[str, str], here: Path, monkeypatch: Any) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"set RANK to 0, 1, .* and WORLD_SIZE to their number"):
        Share.of_environment()


def test_results_that_are_there_whole_are_not_made_again(run: Any, here: Path, clip: bytes) -> None:
    for name in "abcde":
        write_photo(here / f"{name}.png", ord(name))
    (here / "f.mp4").write_bytes(clip)
    arguments = (*(f"{name}.png" for name in "abcde"), "f.mp4", *LABELS, "--out", "out")
    assert run(*arguments)[0] == 0
    Path("out/b_labels.png").unlink()
    Path("out/c_segmentation.json").write_text("{")
    record = json.loads(Path("out/d_segmentation.json").read_text())
    Path("out/d_segmentation.json").write_text(json.dumps({**record, "source": "other.png"}))
    code, out, err = run(*arguments, "--skip-existing")
    assert (code, err) == (0, ["groupvit: note: 3 of 6 inputs have their results in out already"])
    assert [line.split(":")[0] for line in out] == ["b.png", "c.png", "d.png"]
    # Other labels, or more files, are other results.
    assert len(run(*arguments, "--skip-existing", "--background-labels", "sand, blue")[1]) == 6
    assert len(run("a.png", "b.png", *LABELS, "--out", "out", "--skip-existing", "--group-map")[1]) == 2
    assert len(run("f.mp4", *LABELS, "--out", "out", "--skip-existing", "--label-maps", "npz")[1]) == 1
    assert run("f.mp4", *LABELS, "--out", "out", "--skip-existing", "--label-maps", "npz")[1] == []
