"""Pipelines: zero-shot classification of images with given parts, features of images, one image or a batch."""

import json
import sys
from pathlib import Path

from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, GroupViTModel, pipeline


def main(checkpoint, data):
    model = GroupViTModel.from_pretrained(checkpoint)
    classifier = pipeline(
        task="zero-shot-image-classification",
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(checkpoint),
        image_processor=AutoImageProcessor.from_pretrained(checkpoint),
    )
    paths = [str(path) for path in sorted(Path(data).glob("*.png"))]
    labels = ["a cat", "a dog", "a red bus"]
    one = classifier(paths[0], candidate_labels=labels)
    opened = classifier(Image.open(paths[1]), candidate_labels=labels, hypothesis_template="a picture of {}")
    several = classifier(paths[:3], candidate_labels=labels[:2])
    return {
        "one": one,
        "opened": opened,
        "several": several,
        "order": [result["label"] for result in one],
        "sum": sum(result["score"] for result in one),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
