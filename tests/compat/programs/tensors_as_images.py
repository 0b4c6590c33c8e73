"""Images that are tensors already, as attacks and augmentations have them; the processor is told what not to do."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessor, GroupViTModel


class Wrapper(torch.nn.Module):
    def __init__(self, checkpoint):
        super().__init__()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = GroupViTModel.from_pretrained(checkpoint).to(self.device)
        self.processor = AutoProcessor.from_pretrained(checkpoint, do_rescale=False)

    def process_image(self, images):
        return self.processor(images=images, return_tensors="pt", padding=True).to(self.device)

    def process_text(self, texts):
        return self.processor(text=texts, return_tensors="pt", padding=True).to(self.device)

    def forward(self, images, texts):
        pixels = self.process_image(images.to(self.device))["pixel_values"]
        return self.model(**self.process_text(texts), pixel_values=pixels).logits_per_image


def main(checkpoint, data):
    wrapper = Wrapper(checkpoint)
    arrays = [np.array(Image.open(Path(data, name)).convert("RGB").resize((36, 32))) for name in ("a.png", "f.png")]
    batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    texts = ["a red bus", "food on a table", "a dog"]
    with torch.no_grad():
        clean = wrapper(batch, texts)
        flipped = wrapper(batch.flip(-1).roll(3, dims=2), texts)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 24}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    image = Image.open(Path(data, "d.png"))
    plain = image_processor(image, return_tensors="np").pixel_values
    uncropped = image_processor(image, do_center_crop=False, return_tensors="np")["pixel_values"]
    raw = image_processor.preprocess(arrays, do_normalize=False, do_rescale=False, return_tensors="np").pixel_values
    smaller = image_processor(arrays[0], size={"shortest_edge": 12}, crop_size=12, return_tensors="pt")
    settings = image_processor.to_dict()
    return {
        "clean": clean.tolist(),
        "flipped": flipped.tolist(),
        "shapes": [list(plain.shape), list(uncropped.shape), list(raw.shape), list(smaller["pixel_values"].shape)],
        "values": [float(plain.mean()), float(uncropped.std()), float(raw.max()), float(smaller.pixel_values.sum())],
        "settings": [settings[name] for name in ("size", "crop_size", "image_mean", "do_convert_rgb", "resample")],
        "rescale": wrapper.processor.image_processor.do_rescale,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
