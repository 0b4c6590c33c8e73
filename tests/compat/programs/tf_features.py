"""Features over a data set inside tf.function, models from configurations, weights by list, mixed ways of calling."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, GroupViTConfig, TFGroupViTModel, TFGroupViTTextModel


def main(checkpoint, data):
    model = TFGroupViTModel.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    image_processor = CLIPImageProcessor.from_pretrained(checkpoint)
    paths = [str(path) for path in sorted(Path(data).glob("*.png"))]

    def load(path):
        return image_processor(Image.open(path.numpy().decode()), return_tensors="np")["pixel_values"][0]

    def decode(path):
        pixels = tf.py_function(load, [path], tf.float32)
        return tf.ensure_shape(pixels, (3, 32, 32))

    @tf.function(input_signature=[tf.TensorSpec((None, 3, 32, 32), tf.float32)])
    def embed(pixel_values):
        return tf.math.l2_normalize(model.get_image_features(pixel_values=pixel_values), axis=-1)

    dataset = tf.data.Dataset.from_tensor_slices(paths).map(decode).batch(4)
    images = np.concatenate([embed(batch).numpy() for batch in dataset])
    encoded = tokenizer(["a red bus", "a cat on a couch", "food"], padding=True, return_tensors="tf")
    texts = model.get_text_features(**encoded)
    tower = TFGroupViTTextModel.from_pretrained(checkpoint)
    by_name = tower(encoded["input_ids"], attention_mask=encoded["attention_mask"]).pooler_output
    by_list = tower([encoded["input_ids"], encoded["attention_mask"]])[1]
    by_dictionary = tower(dict(encoded), output_hidden_states=True)

    config = GroupViTConfig.from_pretrained(checkpoint)
    config.note = "from tensorflow"
    fresh = TFGroupViTModel(config)
    pixels = np.zeros((1, 3, 32, 32), np.float32)
    fresh(input_ids=encoded["input_ids"], pixel_values=pixels)  # builds the weights
    fresh.set_weights(model.get_weights())
    with tempfile.TemporaryDirectory() as folder:
        fresh.save_pretrained(folder)
        note = GroupViTConfig.from_pretrained(folder).note
        again = TFGroupViTModel.from_pretrained(folder)
    difference = again(input_ids=encoded["input_ids"], pixel_values=pixels).logits_per_text
    return {
        "images": images[:, :4].tolist(),
        "texts": texts.numpy()[:, :4].tolist(),
        "nearest": (images @ texts.numpy().T).argmax(axis=1).tolist(),
        "same": [bool(np.allclose(by_name, other)) for other in (by_list, by_dictionary.pooler_output)],
        "hidden": [list(state.shape) for state in by_dictionary.hidden_states],
        "note": note,
        "logits": difference.numpy().tolist(),
        "weights": len(model.trainable_weights),
        "parameters": int(sum(np.prod(weight.shape) for weight in model.trainable_weights)),
        "embedding": type(tower.get_input_embeddings()).__name__.endswith(("Embedding", "Embeddings")),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
