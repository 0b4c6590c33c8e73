"""Zero-shot classification as the model card shows it, then with an ensemble of prompts and over a batch."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, GroupViTModel

TEMPLATES = ["a photo of a {}.", "a drawing of the {}.", "itap of a {}."]


def card(checkpoint, path):
    model = GroupViTModel.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    image = Image.open(path)
    inputs = processor(text=["a photo of a cat", "a photo of a dog"], images=image, return_tensors="pt", padding=True)
    outputs = model(**inputs)
    logits_per_image = outputs.logits_per_image  # this is the image-text similarity score
    probs = logits_per_image.softmax(dim=1)  # we can take the softmax to get the label probabilities
    return model, processor, probs


def main(checkpoint, data):
    model, processor, probs = card(checkpoint, Path(data, "c.png"))
    names = ["cat", "dog", "bus", "tree"]
    prompts = [template.format(name) for name in names for template in TEMPLATES]
    images = [np.array(Image.open(path).convert("RGB")) for path in sorted(Path(data).glob("*.png"))]
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding="max_length", truncation=True)
    with torch.no_grad():
        outputs = model(**inputs, return_dict=False)
    logits_per_image, logits_per_text = outputs[0], outputs[1]
    scores = logits_per_image.reshape(len(images), len(names), len(TEMPLATES)).mean(dim=-1)
    top = scores.topk(2, dim=-1)
    return {
        "card": probs.tolist(),
        "scores": scores.tolist(),
        "top": [[names[i] for i in row] for row in top.indices.tolist()],
        "transposed": bool(torch.equal(logits_per_text, logits_per_image.t())),
        "length": list(inputs["input_ids"].shape),
        "outputs": len(outputs),
        "training": model.training,
        "names": processor.tokenizer.model_input_names + processor.image_processor.model_input_names,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
