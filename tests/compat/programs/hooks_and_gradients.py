"""Looks inside: forward hooks by module name, hidden states, gradients of a score with regard to pixels and groups."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, GroupViTModel


def main(checkpoint, data):
    model = GroupViTModel.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    caught = {}

    def catch(name):
        def hook(module, inputs, output):
            caught[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    stage = model.vision_model.encoder.stages[1]
    handles = [
        model.text_model.encoder.layers[0].self_attn.q_proj.register_forward_hook(catch("text_query")),
        model.vision_model.embeddings.patch_embeddings.projection.register_forward_hook(catch("patches")),
        stage.layers[0].mlp.fc1.register_forward_hook(catch("hidden")),
        stage.downsample.assign.q_proj.register_forward_hook(catch("assign_query")),
        stage.downsample.norm_new_x.register_forward_hook(catch("new_groups")),
        model.vision_model.layernorm.register_forward_hook(catch("final")),
        model.visual_projection[0].register_forward_hook(catch("projection")),
    ]
    image = Image.open(Path(data, "e.png"))
    inputs = processor(text=["a small dog", "a couch"], images=image, return_tensors="pt", padding=True)
    inputs["pixel_values"].requires_grad_(True)
    outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
    outputs.logits_per_image[0, 0].backward()
    for handle in handles:
        handle.remove()
    gradient = inputs["pixel_values"].grad
    vision, text = outputs.vision_model_output, outputs.text_model_output
    state = model.state_dict()
    return {
        "caught": {name: [list(value.shape), float(value.double().abs().mean())] for name, value in caught.items()},
        "saliency": gradient.abs().amax(dim=1)[0, ::8, ::8].tolist(),
        "hidden": [
            [list(h.shape), float(h.detach().abs().mean())] for h in (*vision.hidden_states, *text.hidden_states)
        ],
        "attentions": [list(a.shape) for a in (*vision.attentions, *text.attentions)],
        "sums": [float(a.detach().sum(dim=1).mean()) for a in vision.attentions],
        "linear": [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][::9],
        "norms": sum(isinstance(module, torch.nn.LayerNorm) for module in model.modules()),
        "parameters": [len(list(model.parameters())), sum(p.numel() for p in model.parameters())],
        "state": list(list(state)[:: len(state) // 12]),
        "embedding": list(model.text_model.embeddings.token_embedding.weight.shape),
        "unpacked": [list(part.shape) for part in outputs.to_tuple()[:4]],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
