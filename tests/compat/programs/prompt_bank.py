"""A bank of text embeddings: the text tower alone, prompts averaged, padded in two ways, kept in a file."""

import json
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoTokenizer, GroupViTTextModel, set_seed

TEMPLATES = ("a photo of a {}", "a close-up of the {}", "{}")


class Bank:
    def __init__(self, checkpoint):
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.model = GroupViTTextModel.from_pretrained(checkpoint, torch_dtype=torch.float32)
        self.model.eval()
        self.embed = lru_cache(maxsize=100)(self._embed)

    def _embed(self, name):
        texts = [template.format(name) for template in TEMPLATES]
        inputs = self.tokenizer(texts, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            pooled = self.model(**inputs).pooler_output
        pooled = pooled / pooled.norm(dim=-1, keepdim=True)
        return pooled.mean(dim=0)


def main(checkpoint, data):
    set_seed(3)
    noise = torch.rand(2).tolist()
    bank = Bank(checkpoint)
    names = ["cat", "dog", "red bus", "cat"]
    embeddings = torch.stack([bank.embed(name) for name in names])
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"names": names, "embeddings": embeddings.clone()}, Path(folder, "bank.pt"))
        stored = torch.load(Path(folder, "bank.pt"), weights_only=True)
    ids = bank.tokenizer(["a cat", "two dogs on a couch"], padding=True, return_tensors="pt")
    with torch.no_grad():
        masked = bank.model(**ids).last_hidden_state
        unmasked = bank.model(ids.input_ids).last_hidden_state
        shifted = bank.model(ids.input_ids, position_ids=torch.arange(1, ids.input_ids.shape[1] + 1)[None])[1]
        tuple_ = bank.model(ids["input_ids"], ids["attention_mask"], return_dict=False)
    return {
        "noise": noise,
        "embeddings": stored["embeddings"][:, :5].tolist(),
        "cosines": (embeddings @ embeddings.T).tolist(),
        "calls": bank.embed.cache_info().misses,
        "first": masked[0, :3, :2].tolist(),
        "padding": bool(torch.allclose(masked[0, :4], unmasked[0, :4], atol=1e-5)),
        "shifted": shifted[:, :3].tolist(),
        "tuple": [len(tuple_), list(tuple_[1].shape)],
        "dtype": str(bank.model.dtype),
        "config": [
            bank.model.config.vocab_size,
            bank.model.config.eos_token_id,
            bank.model.config.max_position_embeddings,
        ],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
