"""A Keras model with a train_step of its own around two towers, trained with fit over tf.data."""

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image
from transformers import CLIPProcessor, TFGroupViTTextModel, TFGroupViTVisionModel


class DualEncoder(tf.keras.Model):
    def __init__(self, checkpoint, **kwargs):
        super().__init__(**kwargs)
        self.text = TFGroupViTTextModel.from_pretrained(checkpoint)
        self.vision = TFGroupViTVisionModel.from_pretrained(checkpoint)
        self.text.trainable = self.vision.trainable = False
        self.text_head = tf.keras.layers.Dense(
            6, use_bias=False, kernel_initializer=tf.keras.initializers.Constant(0.02)
        )
        self.image_head = tf.keras.layers.Dense(6, use_bias=False, kernel_initializer="ones")
        self.tracker = tf.keras.metrics.Mean(name="loss")

    @property
    def metrics(self):
        return [self.tracker]

    def call(self, features, training=False):
        texts = self.text(input_ids=features["input_ids"], attention_mask=features["attention_mask"]).pooler_output
        images = self.vision(pixel_values=features["pixel_values"], training=False).pooler_output
        return self.text_head(texts), self.image_head(images)

    def loss_of(self, features, training):
        texts, images = self(features, training=training)
        return tf.reduce_mean(tf.square(texts - images[:, ::-1]))

    def train_step(self, features):
        with tf.GradientTape() as tape:
            loss = self.loss_of(features, training=True)
        variables = [*self.text_head.trainable_variables, *self.image_head.trainable_variables]
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}

    def test_step(self, features):
        self.tracker.update_state(self.loss_of(features, training=False))
        return {"loss": self.tracker.result()}


def main(checkpoint, data):
    processor = CLIPProcessor.from_pretrained(checkpoint)
    captions = json.loads(Path(data, "captions.json").read_text())
    images = [Image.open(Path(data, name)).convert("RGB") for name in captions]
    inputs = processor(text=list(captions.values()), images=images, padding=True, return_tensors="np")
    features = {
        "input_ids": inputs["input_ids"].astype(np.int32),
        "attention_mask": inputs["attention_mask"].astype(np.int32),
        "pixel_values": np.stack(inputs["pixel_values"]),
    }
    dataset = tf.data.Dataset.from_tensor_slices(features).batch(3)
    model = DualEncoder(checkpoint)
    model.compile(optimizer=tf.keras.optimizers.SGD(0.001), run_eagerly=True)
    history = model.fit(dataset, epochs=2, verbose=0)
    final = model.evaluate(dataset, verbose=0, return_dict=True)
    texts, pictures = model({name: value[:2] for name, value in features.items()})
    return {
        "losses": [float(value) for value in history.history["loss"]],
        "final": float(final["loss"]),
        "texts": np.asarray(texts).tolist(),
        "images": np.asarray(pictures).tolist(),
        "trainable": len(model.trainable_variables),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
