"""Searches images by text and texts by image with embeddings that are kept on disk."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, GroupViTModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 4


class Encoder:
    def __init__(self, checkpoint):
        self.model = GroupViTModel.from_pretrained(checkpoint).to(DEVICE).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)

    @torch.no_grad()
    def images(self, paths):
        found = []
        for start in range(0, len(paths), BATCH):
            batch = [Image.open(path).convert("RGB") for path in paths[start : start + BATCH]]
            inputs = self.processor(images=batch, return_tensors="pt").to(self.model.device)
            features = self.model.get_image_features(**inputs)
            features /= features.norm(dim=-1, keepdim=True)
            found.append(features.cpu().numpy())
        return np.concatenate(found)

    @torch.no_grad()
    def texts(self, texts):
        inputs = self.processor(text=texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        features = self.model.get_text_features(**inputs)
        features /= features.norm(p=2, dim=-1, keepdim=True)
        return features.cpu().numpy()


def recall_at(k, similarity):
    nearest = np.argsort(-similarity, axis=1)[:, :k]
    return float(np.mean([row in nearest[row] for row in range(len(similarity))]))


def main(checkpoint, data):
    captions = json.loads(Path(data, "captions.json").read_text())
    encoder = Encoder(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(
            Path(folder, "index.npz"),
            names=list(captions),
            embeddings=encoder.images([Path(data, n) for n in captions]),
        )
        index = dict(np.load(Path(folder, "index.npz")))
    texts = encoder.texts(list(captions.values()))
    similarity = texts @ index["embeddings"].T
    scale = encoder.model.logit_scale.exp().item()
    query = encoder.texts("a dog")
    return {
        "similarity": similarity.tolist(),
        "recall": {k: [recall_at(k, similarity), recall_at(k, similarity.T)] for k in (1, 3, 5)},
        "best": [str(index["names"][i]) for i in similarity.argmax(axis=1)],
        "query": (scale * query @ index["embeddings"].T)[0].tolist(),
        "width": [encoder.model.config.projection_dim, encoder.model.projection_dim],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
