"""Segments a photo with an exported model in onnxruntime, without the program that trained it.

groupvit export demo exported --to onnx --parts segment --labels "red, green, blue" --background-labels "grass"
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


def segment(folder: Path, photo: Image.Image, shorter_side: int | None = None) -> tuple[np.ndarray, list[str]]:
    """Returns the label of each pixel of the resized photo, and the labels' names."""
    session = onnxruntime.InferenceSession(folder / "segmenter.onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map["groupvit"])
    # A model trained at 224 pixels segments best at 448. Sides are multiples of the patch size.
    side = shorter_side or (448 if about["image_size"] == 224 else about["image_size"])
    patch, scale = about["patch_size"], side / min(photo.size)
    width, height = (max(2, round(length * scale / patch)) * patch for length in photo.size)
    image = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    pixels = ((image - about["image_mean"]) / about["image_std"]).transpose(2, 0, 1)[None].astype(np.float32)
    return session.run(["label_map"], {"pixel_values": pixels})[0][0], about["labels"]


def overlay(photo: Image.Image, label_map: np.ndarray, names: list[str]) -> Image.Image:
    """Returns the photo tinted by labels, with their names; background stays as it is."""
    colours = np.uint8([[255 * part for part in colorsys.hsv_to_rgb(0.618 * i % 1, 0.8, 1)] for i in range(len(names))])
    strength = np.array([0 if name == "background" else 140 for name in names], np.uint8)
    maps = (colours[label_map], strength[label_map])
    tint, mask = (Image.fromarray(each).resize(photo.size, Image.Resampling.NEAREST) for each in maps)
    drawn = Image.composite(tint, photo, mask)
    pen = ImageDraw.Draw(drawn)
    for row, value in enumerate(value for value in np.unique(label_map) if strength[value]):
        pen.text((5, 5 + 15 * row), names[value], tuple(colours[value].tolist()), stroke_width=2, stroke_fill="black")
    return drawn


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("folder", "photo", "overlay"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--shorter-side", type=int, help="pixels of the shorter side that the model sees")
    options = parser.parse_args(arguments)
    photo = ImageOps.exif_transpose(Image.open(options.photo)).convert("RGB")
    label_map, names = segment(options.folder, photo, options.shorter_side)
    overlay(photo, label_map, names).save(options.overlay)
    for value, count in sorted(enumerate(np.bincount(label_map.ravel(), minlength=len(names))), key=lambda x: -x[1]):
        print(f"{count / label_map.size:6.1%}  {names[value]}")


if __name__ == "__main__":
    main()
