"""LoRA through peft: get_peft_model, training, adapters saved and loaded, merge_and_unload."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoProcessor, GroupViTModel


def main(checkpoint, data):
    torch.manual_seed(0)
    captions = json.loads(Path(data, "captions.json").read_text())
    processor = AutoProcessor.from_pretrained(checkpoint)
    base = GroupViTModel.from_pretrained(checkpoint)
    config = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.0, bias="none", target_modules=["q_proj", "v_proj"], modules_to_save=[]
    )
    model = get_peft_model(base, config)
    trainable, everything = model.get_nb_trainable_parameters()
    images = [Image.open(Path(data, name)) for name in captions]
    inputs = processor(text=list(captions.values()), images=images, return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = sorted(path.name for path in Path(folder).iterdir())
        again = PeftModel.from_pretrained(GroupViTModel.from_pretrained(checkpoint), folder).merge_and_unload()
    with torch.no_grad():
        logits = again(**inputs).logits_per_image
    return {
        "counts": [trainable, everything],
        "losses": losses,
        "files": files,
        "logits": logits.tolist(),
        "class": type(again).__name__,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
