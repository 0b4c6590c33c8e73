"""A tf.data pipeline and a loop of its own with GradientTape: the text projection learns fixed images' embeddings."""

import json
import sys
import tempfile
from pathlib import Path

import tensorflow as tf
from PIL import Image
from transformers import AutoProcessor, TFGroupViTModel


def pipeline(processor, captions, data):
    images = [Image.open(Path(data, name)) for name in captions]
    inputs = processor(
        text=list(captions.values()),
        images=images,
        padding="max_length",
        max_length=40,
        truncation=True,
        return_tensors="np",
    )
    dataset = tf.data.Dataset.from_tensor_slices(dict(inputs))
    dataset = dataset.map(lambda row: {**row, "input_ids": tf.cast(row["input_ids"], tf.int32)})
    return dataset.batch(3, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def contrastive(texts, images, scale):
    logits = tf.matmul(tf.math.l2_normalize(texts, -1), tf.math.l2_normalize(images, -1), transpose_b=True) * scale
    labels = tf.range(tf.shape(logits)[0])
    losses = [
        tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, side))
        for side in (logits, tf.transpose(logits))
    ]
    return (losses[0] + losses[1]) / 2


def main(checkpoint, data):
    tf.random.set_seed(0)
    captions = json.loads(Path(data, "captions.json").read_text())
    model = TFGroupViTModel.from_pretrained(checkpoint)
    dataset = pipeline(AutoProcessor.from_pretrained(checkpoint), captions, data)
    optimizer = tf.keras.optimizers.SGD(learning_rate=0.05)
    variables = [
        variable
        for variable in model.trainable_variables
        if "text" in variable.name or "text" in str(getattr(variable, "path", ""))
    ]
    losses = []
    for _ in range(2):
        for batch in dataset:
            images = model.get_image_features(pixel_values=batch["pixel_values"])
            with tf.GradientTape() as tape:
                texts = model.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                loss = contrastive(texts, tf.stop_gradient(images), tf.exp(model.groupvit.logit_scale))
            gradients = tape.gradient(loss, variables)
            gradients, norm = tf.clip_by_global_norm(gradients, 1.0)
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
            losses.append([float(loss), float(norm)])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = TFGroupViTModel.from_pretrained(folder)
    after = again(**batch, return_loss=True, training=False)
    return {
        "losses": losses,
        "variables": len(variables),
        "after": float(tf.reduce_mean(after.loss)),
        "logits": after.logits_per_image.numpy().tolist(),
        "shapes": [list(value.shape) for value in batch.values()],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
