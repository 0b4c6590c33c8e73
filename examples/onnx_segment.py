"""Segments a photo with an exported model in onnxruntime, without the program that trained it.

groupvit export demo exported --to onnx --parts segment --preprocess --labels "red, green" --background-labels "grass"
pip install onnxruntime numpy pillow
python examples/onnx_segment.py exported photo.jpg overlay.png
"""

import argparse
import colorsys
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def segment(folder: Path, photo: Image.Image) -> tuple[np.ndarray, list[str]]:
    """Returns the label of each pixel of the photo, and the labels' names."""
    session = onnxruntime.InferenceSession(folder / "segmenter.onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map["groupvit"])
    if not about["preprocess"] or about["labels"] is None:
        raise SystemExit("export the segmenter with --preprocess and --labels: this program has no words of its own")
    return session.run(["label_map"], {"images": np.asarray(photo)[None]})[0][0], about["labels"]


def overlay(photo: Image.Image, label_map: np.ndarray, names: list[str]) -> Image.Image:
    """Returns the photo tinted by labels, with their names; background stays as it is."""
    colours = np.uint8([[255 * part for part in colorsys.hsv_to_rgb(0.618 * i % 1, 0.8, 1)] for i in range(len(names))])
    strength = np.array([0 if name == "background" else 140 for name in names], np.uint8)
    maps = (colours[label_map], strength[label_map])
    tint, mask = (Image.fromarray(each) for each in maps)
    drawn = Image.composite(tint, photo, mask)
    pen = ImageDraw.Draw(drawn)
    for row, value in enumerate(value for value in np.unique(label_map) if strength[value]):
        pen.text((5, 5 + 15 * row), names[value], tuple(colours[value].tolist()), stroke_width=2, stroke_fill="black")
    return drawn


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("folder", "photo", "overlay"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    photo = ImageOps.exif_transpose(Image.open(options.photo)).convert("RGB")
    label_map, names = segment(options.folder, photo)
    overlay(photo, label_map, names).save(options.overlay)
    for value, count in sorted(enumerate(np.bincount(label_map.ravel(), minlength=len(names))), key=lambda x: -x[1]):
        print(f"{count / label_map.size:6.1%}  {names[value]}")


if __name__ == "__main__":
    main()
