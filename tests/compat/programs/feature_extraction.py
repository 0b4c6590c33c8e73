"""Features of a folder with a DataLoader, the processor in collate_fn; then a linear probe on them."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPProcessor, GroupViTModel, GroupViTVisionModel


class ImageFolder(Dataset):
    def __init__(self, root):
        self.paths = sorted(Path(root).glob("*.png"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return {"image": Image.open(self.paths[index]), "label": index % 3, "name": self.paths[index].name}


def collate(processor, batch):
    inputs = processor(images=[example["image"] for example in batch], return_tensors="pt")
    inputs["labels"] = torch.tensor([example["label"] for example in batch])
    inputs["names"] = [example["name"] for example in batch]
    return inputs


def main(checkpoint, data):
    processor = CLIPProcessor.from_pretrained(checkpoint)
    model = GroupViTModel.from_pretrained(checkpoint)
    tower = GroupViTVisionModel.from_pretrained(checkpoint)
    model.eval(), tower.eval()
    loader = DataLoader(ImageFolder(data), batch_size=4, shuffle=False, collate_fn=partial(collate, processor))
    features, pooled, tokens, labels, names = [], [], [], [], []
    for batch in loader:
        names += batch.pop("names")
        labels.append(batch.pop("labels"))
        with torch.no_grad():
            found = model.get_image_features(**batch)
            features.append(found if torch.is_tensor(found) else found.pooler_output)
            outputs = tower(batch["pixel_values"], output_hidden_states=True)
        pooled.append(outputs.pooler_output)
        tokens.append(outputs.last_hidden_state.mean(dim=1))
    features, pooled, labels = torch.cat(features), torch.cat(pooled), torch.cat(labels)
    centred = features - features.mean(dim=0)
    targets = torch.nn.functional.one_hot(labels, 3).float()
    ridge = centred.T @ centred + torch.eye(features.shape[1])
    probe = torch.linalg.solve(ridge, centred.T @ targets)
    distances = torch.cdist(features, features)
    return {
        "names": names,
        "features": features[:, :4].tolist(),
        "pooled": pooled[:, :4].tolist(),
        "tokens": torch.cat(tokens)[:, :2].tolist(),
        "probe": (centred @ probe).argmax(dim=1).tolist(),
        "nearest": distances.fill_diagonal_(torch.inf).argmin(dim=1).tolist(),
        "same": bool(torch.allclose(model.vision_model(batch["pixel_values"]).pooler_output, outputs[1], atol=1e-6)),
        "width": [tower.config.hidden_size, tower.config.image_size, model.config.vision_config.patch_size],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
