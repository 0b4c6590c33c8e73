"""A small trainer with the habits of the large one: it asks the model what it takes, saves in folders, evaluates."""

import inspect
import json
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, GroupViTConfig, GroupViTModel


class Trainer:
    def __init__(self, model, train, evaluation, folder, learning_rate=1e-3):
        self.model, self.train_set, self.evaluation, self.folder = model, train, evaluation, Path(folder)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        self.columns = list(inspect.signature(model.forward).parameters)
        self.log = []

    def prepare(self, batch):
        return {name: value.to(self.model.device) for name, value in batch.items() if name in self.columns}

    def training_step(self, batch):
        outputs = self.model(**self.prepare(batch), return_loss=True)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        loss.backward()
        self.optimizer.step()
        self.model.zero_grad()
        return loss.detach().item()

    def evaluate(self):
        self.model.eval()
        with torch.no_grad():
            outputs = self.model(**self.prepare(self.evaluation), return_loss=True)
        logits = outputs[1:3]
        return {
            "eval_loss": outputs.loss.item(),
            "accuracy": float((logits[0].argmax(1) == torch.arange(3)).float().mean()),
        }

    def save(self, step):
        folder = self.folder / f"checkpoint-{step}"
        self.model.save_pretrained(folder, state_dict=self.model.state_dict(), safe_serialization=True)
        (folder / "trainer_state.json").write_text(json.dumps(self.log))
        return folder

    def train(self):
        for step, batch in enumerate(self.train_set, 1):
            self.log.append({"step": step, "loss": self.training_step(batch)})
            self.log[-1] |= self.evaluate()
            self.save(step)
        return min(self.log, key=lambda row: row["eval_loss"])["step"]


def main(checkpoint, data):
    captions = json.loads(Path(data, "captions.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, use_fast=True)
    image_processor = AutoImageProcessor.from_pretrained(checkpoint)
    config = GroupViTConfig.from_pretrained(checkpoint, projection_dim=20)
    model = GroupViTModel.from_pretrained(checkpoint, config=config)

    def example(name):
        image = image_processor(Image.open(Path(data, name)).convert("RGB"), return_tensors="pt")
        text = tokenizer(captions[name], padding="max_length", max_length=32, truncation=True, return_tensors="pt")
        return {**image, **text, "file_index": torch.tensor([ord(name[0])])}

    examples = [example(name) for name in captions]
    batches = [{key: torch.cat([e[key] for e in part]) for key in examples[0]} for part in (examples[:3], examples[3:])]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, batches, batches[0], folder)
        best = trainer.train()
        saved = trainer.folder / f"checkpoint-{best}"
        tokenizer.save_pretrained(saved)
        image_processor.save_pretrained(saved)
        again = GroupViTModel.from_pretrained(saved).eval()
        with torch.no_grad():
            loss = again(**trainer.prepare(batches[1]), return_loss=True)[0]
        folders = sorted(path.name for path in trainer.folder.iterdir())
        same_ids = AutoTokenizer.from_pretrained(saved)("a cat")["input_ids"] == tokenizer("a cat")["input_ids"]
    return {
        "log": trainer.log,
        "best": best,
        "again": loss.item(),
        "folders": folders,
        "tokenizer": same_ids,
        "takes": [name in trainer.columns for name in ("input_ids", "pixel_values", "attention_mask", "return_loss")],
        "main_input": model.main_input_name,
        "dtype": str(model.dtype),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
