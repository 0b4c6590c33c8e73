"""Trains through accelerate: prepare, accumulate, backward, clip, unwrap, save."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoProcessor, GroupViTModel


def main(checkpoint, data):
    set_seed(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    captions = json.loads(Path(data, "captions.json").read_text())
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = GroupViTModel.from_pretrained(checkpoint)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "projection" in name or name == "logit_scale"

    def collate(pairs):
        texts = [text for _, text in pairs]
        return processor(
            text=texts, images=[i for i, _ in pairs], return_tensors="pt", padding="max_length", max_length=40
        )

    pairs = [(Image.open(Path(data, name)), text) for name, text in captions.items()]
    loader = DataLoader(pairs, batch_size=3, collate_fn=collate)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    losses = []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model), accelerator.autocast():
                loss = model(**batch, return_loss=True).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())

    with tempfile.TemporaryDirectory() as folder:
        unwrapped = accelerator.unwrap_model(model)
        unwrapped.save_pretrained(
            Path(folder, "model"),
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=accelerator.get_state_dict(model),
        )
        processor.save_pretrained(Path(folder, "model"))
        accelerator.save_state(Path(folder, "state"))
        accelerator.load_state(Path(folder, "state"))
        again = GroupViTModel.from_pretrained(Path(folder, "model"))
        AutoProcessor.from_pretrained(Path(folder, "model"))
    state = again.state_dict()
    return {
        "losses": losses,
        "rate": optimizer.param_groups[0]["lr"],
        "saved": all(torch.equal(tensor, state[name]) for name, tensor in unwrapped.state_dict().items()),
        "scale": again.logit_scale.item(),
        "projection": again.visual_projection[3].bias[:4].tolist(),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
