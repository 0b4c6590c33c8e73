"""Low-rank adapters on every q_proj and v_proj, put in by walking the modules; trained, merged, saved apart."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import AutoProcessor, GroupViTModel


class LoRALinear(nn.Module):
    def __init__(self, base, rank=2, alpha=4.0):
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        generator = torch.Generator().manual_seed(base.in_features)
        self.down = nn.Parameter(torch.randn(rank, base.in_features, generator=generator) * 0.1)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + (x @ self.down.t() @ self.up.t()) * self.scaling

    def merged(self):
        self.base.weight.data += self.scaling * self.up.data @ self.down.data
        return self.base


def wrap(model, targets=("q_proj", "v_proj")):
    model.requires_grad_(False)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.endswith(targets)]
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], LoRALinear(model.get_submodule(name)))
    return names


def merge(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module.merged())


def main(checkpoint, data):
    captions = json.loads(Path(data, "captions.json").read_text())
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = GroupViTModel.from_pretrained(checkpoint)
    names = wrap(model)
    images = [Image.open(Path(data, name)) for name in captions]
    inputs = processor(text=list(captions.values()), images=images, return_tensors="pt", padding=True)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(**inputs, return_loss=True)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        before = model(**inputs).logits_per_image
        merge(model)
        after = model(**inputs).logits_per_image
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with torch.no_grad():
            again = GroupViTModel.from_pretrained(folder)(**inputs).logits_per_image
    return {
        "names": names,
        "trainable": sum(parameter.numel() for parameter in adapters),
        "losses": losses,
        "merged": bool(torch.allclose(before, after, atol=1e-4)),
        "again": again.tolist(),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
