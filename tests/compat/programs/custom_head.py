"""A classifier of its own on the vision tower, a half-precision copy of it, and weights moved by state dictionaries."""

import copy
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, GroupViTVisionConfig, GroupViTVisionModel


class Classifier(nn.Module):
    def __init__(self, checkpoint, classes):
        super().__init__()
        self.backbone = GroupViTVisionModel.from_pretrained(checkpoint)
        self.head = nn.Linear(self.backbone.config.hidden_size, classes)
        nn.init.constant_(self.head.bias, 0.1)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-1, 1, self.head.weight.numel()).view_as(self.head.weight))

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.backbone(pixel_values=pixel_values).pooler_output)
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits}


def main(checkpoint, data):
    image_processor = AutoImageProcessor.from_pretrained(checkpoint)
    images = [Image.open(path).convert("RGB") for path in sorted(Path(data).glob("*.png"))]
    pixel_values = image_processor(images=images, return_tensors="pt")["pixel_values"]
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    model = Classifier(checkpoint, 3)
    for parameter in model.backbone.parameters():
        parameter.requires_grad = False
    for parameter in model.backbone.vision_model.encoder.stages[-1].parameters():
        parameter.requires_grad = True
    optimizer = torch.optim.SGD(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-2, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(pixel_values, labels)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    fresh = GroupViTVisionModel(GroupViTVisionConfig.from_pretrained(checkpoint))
    result = fresh.load_state_dict(model.backbone.state_dict(), strict=True)
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        logits = model(pixel_values)["logits"]
        halved = half(pixel_values.to(torch.bfloat16))["logits"]
        states = fresh.eval()(pixel_values)[0]
    return {
        "losses": losses,
        "logits": logits.tolist(),
        "predicted": logits.argmax(dim=1).tolist(),
        "half": [str(halved.dtype), str(half.backbone.dtype), bool((halved.float() - logits).abs().max() < 0.3)],
        "loaded": [list(result.missing_keys), list(result.unexpected_keys)],
        "states": states.mean(dim=(1, 2)).tolist(),
        "prefix": sorted({name.split(".")[1] for name in model.state_dict()}),
        "device": str(model.backbone.device),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
