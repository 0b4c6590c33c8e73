"""Fine-tunes on captions: AdamW, a schedule, gradient accumulation, clipping; saves, loads and goes on."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import AutoProcessor, GroupViTModel

ACCUMULATE = 2
STEPS = 3


def parameter_groups(model):
    decay, spared = [], []
    for name, parameter in model.named_parameters():
        (spared if parameter.ndim < 2 or name.endswith("bias") else decay).append(parameter)
    return [{"params": decay, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]


def checkpoint_of(model, optimizer, scheduler, folder):
    model.save_pretrained(folder)
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, Path(folder, "state.pt"))


def optimizers(model):
    optimizer = AdamW(parameter_groups(model), lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    return optimizer, LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 2) * (1 - step / 10))


def steps(model, optimizer, scheduler, loader, count):
    losses, norms = [], []
    optimizer.zero_grad()
    for index, batch in zip(range(count * ACCUMULATE), loader, strict=False):
        loss = model(**batch, return_loss=True).loss
        (loss / ACCUMULATE).backward()
        losses.append(loss.item())
        if (index + 1) % ACCUMULATE == 0:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            model.logit_scale.data.clamp_(0, 4.6052)
    return losses, norms


def main(checkpoint, data):
    torch.manual_seed(0)
    captions = json.loads(Path(data, "captions.json").read_text())
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = GroupViTModel.from_pretrained(checkpoint)

    def collate(examples):
        images, texts = zip(*examples, strict=True)
        return processor(text=list(texts), images=list(images), return_tensors="pt", padding=True, truncation=True)

    pairs = [(Image.open(Path(data, name)).convert("RGB"), text) for name, text in captions.items()] * 2
    loader = DataLoader(pairs, batch_size=3, collate_fn=collate)
    optimizer, scheduler = optimizers(model)
    losses, norms = steps(model, optimizer, scheduler, loader, 1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint_of(model, optimizer, scheduler, folder)
        model = GroupViTModel.from_pretrained(folder)
        optimizer, scheduler = optimizers(model)
        state = torch.load(Path(folder, "state.pt"), weights_only=True)
        files = sorted(path.name for path in Path(folder).iterdir())
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    more, later = steps(model, optimizer, scheduler, loader, STEPS - 1)
    return {
        "losses": losses + more,
        "norms": norms + later,
        "rates": scheduler.get_last_lr(),
        "scale": model.logit_scale.item(),
        "weights": [float(p.detach().double().abs().sum()) for p in list(model.parameters())[::15]],
        "counts": [len(parameter_groups(model)[0]["params"]), len(parameter_groups(model)[1]["params"])],
        "files": [name for name in files if name != "generation_config.json"],
        "trainable": model.num_parameters(only_trainable=True),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
