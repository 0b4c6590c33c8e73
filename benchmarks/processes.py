"""Whole processes from start to end, in turn: imports, and one photo from a checkpoint to files."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# title -> program -> a line of Python; the first is ours.
IMPORTS = {
    "import of the model class": {
        "groupvit": "from groupvit_torch import GroupViTModel",
        "transformers 5": "from transformers import GroupViTModel",
        "torch alone": "import torch",
    },
    "import of the processor": {
        "groupvit": "from groupvit_torch import GroupViTProcessor",
        "transformers 5": "from transformers import CLIPProcessor",
    },
}

SEGMENT = """
import sys
from groupvit_common.cli import main
sys.exit(main(["segment", {photo!r}, "--model", {folder!r}, "--labels", "sky, grass", "--out", {out!r},
               "--backend", {backend!r}]))
"""
# What its users write for a label map and an overlay. Its model takes 224 x 224 pixels alone, a quarter of ours.
SEGMENT_BY_TRANSFORMERS = """
import os
import numpy, torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTokenizerFast, GroupViTModel
model = GroupViTModel.from_pretrained({folder!r}).eval()
image_processor = CLIPImageProcessor(size={{"height": 224, "width": 224}}, do_center_crop=False)
photo = Image.open({photo!r}).convert("RGB")
pixels = image_processor(photo, return_tensors="pt")["pixel_values"]
texts = CLIPTokenizerFast.from_pretrained({folder!r})(
    ["a photo of a sky.", "a photo of a grass."], padding="max_length", max_length=77, return_tensors="pt")
with torch.no_grad():
    logits = model(**texts, pixel_values=pixels, output_segmentation=True).segmentation_logits
    logits = torch.nn.functional.interpolate(logits, size=photo.size[::-1], mode="bilinear")
labels = logits.argmax(1)[0].numpy().astype("uint8")
os.makedirs({out!r}, exist_ok=True)
Image.fromarray(labels).save(os.path.join({out!r}, "labels.png"))
colours = numpy.array([[200, 80, 60], [60, 120, 200]], "uint8")[labels]
Image.blend(photo, Image.fromarray(colours), 0.5).save(os.path.join({out!r}, "overlay.png"))
"""


def cases(folder: Path, photo: Path, *, rounds: int) -> Iterator[tuple[str, dict[str, str], int]]:
    """Yields a title, the line of each program, and how many times it is timed."""
    for title, programs in IMPORTS.items():
        yield title, programs, rounds
    given = {"folder": str(folder), "photo": str(photo), "out": str(folder / "out")}
    programs = {f"groupvit {backend}": SEGMENT.format(**given, backend=backend) for backend in ("torch", "tf")}
    programs["transformers 5"] = SEGMENT_BY_TRANSFORMERS.format(**given)
    yield "one photo segmented, start to files written (transformers: at 224 x 224)", programs, max(1, rounds // 2)


def times(programs: Mapping[str, str], pythons: Mapping[str, str], rounds: int) -> dict[str, Any]:
    """Measures processes in turn, by the Python of each; a first round warms the disk.

    Returns the times of each program by round, or why it failed.
    """
    rows: dict[str, Any] = {name: {"wall": [], "cpu": []} for name in programs}
    for turn in range(rounds + 1):
        for name, code in programs.items():
            if "failed" in rows[name]:
                continue
            try:
                wall, used = run_once(pythons[name], code)
                if turn:
                    rows[name]["wall"].append(wall)
                    rows[name]["cpu"].append(used)
            except RuntimeError as error:
                rows[name] = {"failed": str(error)}
    return rows


def run_once(python: str, code: str, limit: float = 600.0) -> list[float]:
    """Returns wall and CPU seconds of a fresh process; RuntimeError if it fails, or is not done in `limit` seconds."""
    before, begun = os.times(), time.perf_counter()
    settings = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [python, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, **settings}, check=False, timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done within {limit:g} s") from None
    wall, after = time.perf_counter() - begun, os.times()
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["failed"])[-1])
    return [wall, after.children_user + after.children_system - before.children_user - before.children_system]
