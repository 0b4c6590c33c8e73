"""Zero-shot classification and segmentation in TensorFlow: the model card's lines, the towers, the groups' map."""

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image
from transformers import AutoProcessor, TFGroupViTModel
from transformers.models.groupvit.modeling_tf_groupvit import get_grouping_from_attentions


def main(checkpoint, data):
    model = TFGroupViTModel.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    image = Image.open(Path(data, "c.png"))
    inputs = processor(text=["a photo of a cat", "a photo of a dog"], images=image, return_tensors="tf", padding=True)
    outputs = model(**inputs)
    logits_per_image = outputs.logits_per_image  # this is the image-text similarity score
    probs = tf.nn.softmax(logits_per_image, axis=1)  # we can take the softmax to get the label probabilities

    segmented = model(inputs, output_segmentation=True, output_attentions=True, training=False)
    attentions = segmented.vision_model_output.attentions
    grouping = get_grouping_from_attentions(attentions, tuple(inputs["pixel_values"].shape[2:]))
    scores = segmented.segmentation_logits / tf.exp(model.groupvit.logit_scale)
    text = model.groupvit.text_model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        position_ids=None,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
        training=False,
    )
    return {
        "probs": probs.numpy().tolist(),
        "labels": np.asarray(scores)[0].argmax(axis=0)[::8, ::8].tolist(),
        "scores": np.asarray(scores)[0, :, ::8, ::8].tolist(),
        "groups": tf.argmax(grouping, axis=1).numpy()[0, ::8, ::8].tolist(),
        "pooled": text.pooler_output.numpy()[:, :4].tolist(),
        "keys": list(segmented.keys()),
        "shapes": [list(attention.shape) for attention in attentions],
        "scale": tf.exp(model.groupvit.logit_scale).numpy().item(),
        "tuple": len(model(**inputs, return_dict=False)),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
