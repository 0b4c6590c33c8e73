"""Trains the text tower against fixed embeddings of images: the vision tower is frozen and its features are cached."""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTokenizerFast, GroupViTModel


def freeze(module):
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.eval()


def main(checkpoint, data):
    torch.manual_seed(0)
    captions = json.loads(Path(data, "captions.json").read_text())
    tokenizer = CLIPTokenizerFast.from_pretrained(checkpoint)
    image_processor = CLIPImageProcessor.from_pretrained(checkpoint)
    model = GroupViTModel.from_pretrained(checkpoint)

    pixels = image_processor([Image.open(Path(data, name)) for name in captions], return_tensors="pt").pixel_values
    with torch.no_grad():
        images = model.visual_projection(model.vision_model(pixels)[1])
    images = F.normalize(images, dim=-1)

    model.train()
    freeze(model.vision_model)
    freeze(model.visual_projection)
    model.text_model.gradient_checkpointing = False
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    inputs = tokenizer(list(captions.values()), padding="longest", return_tensors="pt")
    labels = torch.arange(len(captions))
    losses = []
    for _ in range(4):
        outputs = model.text_model(**inputs, output_hidden_states=True, return_dict=True)
        texts = F.normalize(model.text_projection(outputs.pooler_output), dim=-1)
        logits = model.logit_scale.exp() * texts @ images.t()
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        after = model(pixel_values=pixels, **inputs).logits_per_text
    return {
        "losses": losses,
        "layers": len(outputs.hidden_states),
        "after": after.tolist(),
        "running": model.text_projection[1].running_mean[:5].tolist(),
        "seen": int(model.text_projection[1].num_batches_tracked),
        "frozen": all(p.grad is None for p in model.vision_model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
