"""Wrappers with plain tensors in and out, as exporters want them: names of inputs and outputs, a batch of any size."""

import json
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import AutoProcessor, GroupViTModel

INPUTS = OrderedDict(
    input_ids={0: "text_batch", 1: "sequence"},
    pixel_values={0: "image_batch"},
    attention_mask={0: "text_batch", 1: "sequence"},
)


class ForExport(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, pixel_values, attention_mask):
        outputs = self.model(
            input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, return_dict=True
        )
        return outputs.logits_per_image, outputs.logits_per_text, outputs.text_embeds, outputs.image_embeds


class ImageEncoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, pixel_values):
        pooled = self.vision_model(pixel_values, return_dict=False)[1]
        embeds = self.visual_projection(pooled)
        return embeds / embeds.norm(dim=-1, keepdim=True)


def main(checkpoint, data):
    model = GroupViTModel.from_pretrained(checkpoint)
    model.eval()
    model.config.return_dict = False
    processor = AutoProcessor.from_pretrained(checkpoint)
    images = [Image.open(Path(data, f"{letter}.png")) for letter in "abc"]
    inputs = processor(text=["a cat", "a dog with a ball"], images=images, return_tensors="pt", padding=True)
    arguments = tuple(inputs[name] for name in INPUTS)
    wrapper, encoder = ForExport(model), ImageEncoder(model)
    with torch.no_grad():
        outputs = wrapper(*arguments)
        traced = torch.jit.trace(encoder, arguments[1][:2], check_trace=False)
        embeds = traced(arguments[1])
    exported = torch.export.export(encoder, (arguments[1][:2],))
    with torch.no_grad():
        from_program = exported.module()(arguments[1][1:])
    return {
        "logits": outputs[0].tolist(),
        "transposed": outputs[1].tolist(),
        "image_embeds": outputs[3][:, :4].tolist(),
        "traced": bool(torch.allclose(embeds, outputs[3], atol=1e-5)),
        "exported": bool(torch.allclose(from_program, outputs[3][1:], atol=1e-5)),
        "tuple": type(model(**inputs)).__name__,
        "state": sorted({name.split(".")[1] for name in wrapper.state_dict()}),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
