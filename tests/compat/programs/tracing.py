"""TorchScript: the model loaded with torchscript=True gives tuples, is traced, saved, loaded and called."""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, GroupViTModel, GroupViTTextModel, GroupViTVisionModel


def trace(model, example):
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, example)
        torch.jit.save(traced, Path(folder, "traced.pt"))
        return torch.jit.load(Path(folder, "traced.pt"))


def main(checkpoint, data):
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = GroupViTModel.from_pretrained(checkpoint, torchscript=True).eval()
    images = [Image.open(Path(data, name)) for name in ("a.png", "b.png")]
    texts = ["a cat on a couch", "two green trees"]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
    other = processor(text=texts[::-1], images=images[::-1], return_tensors="pt", padding=True)
    order = ("input_ids", "pixel_values", "attention_mask")
    plain = model(**inputs)
    whole = trace(model, tuple(inputs[name] for name in order))
    text = trace(GroupViTTextModel.from_pretrained(checkpoint, torchscript=True), inputs["input_ids"])
    vision = trace(GroupViTVisionModel.from_pretrained(checkpoint, torchscript=True), inputs["pixel_values"])
    with torch.no_grad():
        answer = whole(*(other[name] for name in order))
        states, pooled = text(other["input_ids"])[:2]
        groups = vision(other["pixel_values"])[0]
    return {
        "type": type(plain).__name__,
        "length": [len(plain), len(answer)],
        "logits": answer[0].tolist(),
        "plain": plain[0].tolist(),
        "pooled": pooled[:, :4].tolist(),
        "shapes": [list(states.shape), list(groups.shape)],
        "torchscript": model.config.torchscript,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
