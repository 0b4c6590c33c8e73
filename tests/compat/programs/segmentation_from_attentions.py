"""Segments with embeddings of its own making: the towers one by one, and the groups' map from the attentions."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoProcessor
from transformers import GroupViTModel as HFGroupViTModel
from transformers.models.groupvit.modeling_groupvit import get_grouping_from_attentions


class OpenVocabularySegmenter:
    def __init__(self, checkpoint, device=None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = HFGroupViTModel.from_pretrained(checkpoint).to(self.device).eval()

    def embed(self, word):
        inputs = self.processor(text=[f"a photo of a {word}"], return_tensors="pt", padding=True).to(self.device)
        with torch.inference_mode():
            outputs = self.model.text_model(
                input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"), return_dict=True
            )
            return self.model.text_projection(outputs.pooler_output).cpu()

    def groups(self, image):
        pixel_values = self.processor(images=image, return_tensors="pt").to(self.device)["pixel_values"]
        with torch.inference_mode():
            outputs = self.model.vision_model(pixel_values=pixel_values, output_attentions=True, return_dict=True)
            states = outputs.last_hidden_state
            embeds = self.model.visual_projection(states.reshape(-1, states.shape[-1]))
            grouping = get_grouping_from_attentions(outputs.attentions, pixel_values.shape[2:])
        return F.normalize(embeds, dim=-1), grouping, outputs.attentions

    @torch.inference_mode()
    def masks(self, image, embeddings):
        groups, grouping, _ = self.groups(image)
        flat = grouping.reshape(1, grouping.shape[1], -1)
        scores = []
        for embedding in embeddings:
            logits = groups @ F.normalize(embedding.to(self.device), dim=-1).t() * self.model.logit_scale.exp()
            map_ = torch.matmul(logits.reshape(1, 1, -1), flat).reshape(1, 1, *grouping.shape[2:])
            resized = F.interpolate(torch.sigmoid(map_), size=image.size[::-1], mode="bilinear", align_corners=False)
            scores.append(resized[0, 0].cpu().numpy())
        return np.stack(scores)


def main(checkpoint, data):
    segmenter = OpenVocabularySegmenter(checkpoint)
    image = Image.open(Path(data, "a.png"))
    words = ["bus", "street", "sky"]
    embeddings = [segmenter.embed(word) for word in words]
    blended = 0.3 * embeddings[0] + 0.7 * embeddings[1]
    scores = segmenter.masks(image, [*embeddings, blended])
    labels = scores[:3].argmax(axis=0)
    _, grouping, attentions = segmenter.groups(image)

    inputs = segmenter.processor(text=words, images=image, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = segmenter.model(**inputs, output_segmentation=True)
    background, rest = outputs.segmentation_logits[:, 0:1], outputs.segmentation_logits[:, 1:]
    relative = torch.sub(rest, background).div(segmenter.model.logit_scale.exp())
    return {
        "scores": scores[:, ::10, ::16].tolist(),
        "pixels": np.bincount(labels.ravel(), minlength=3).tolist(),
        "mask": int((scores[3] > scores[3].min() + 0.5 * np.ptp(scores[3])).sum()),
        "groups": grouping.argmax(dim=1)[0, ::8, ::8].tolist(),
        "shapes": [list(attention.shape) for attention in attentions],
        "relative": relative[0, :, ::8, ::8].tolist(),
        "keys": list(outputs.keys()),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
