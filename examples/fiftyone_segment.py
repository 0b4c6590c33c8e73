"""Segments a FiftyOne data set by labels: a `Segmenter` as a model for `dataset.apply_model`.

pip install fiftyone 'groupvit[torch]'
python examples/fiftyone_segment.py photos --labels "cat, dog | puppy" --background-labels "sky, grass"
"""

import argparse
from typing import Any

import fiftyone as fo
import numpy as np
from fiftyone.core.models import Model

from groupvit_common.segmentation.adapters import to_fiftyone
from groupvit_common.segmentation.result import Segmentation
from groupvit_torch import Segmenter


class SegmenterModel(Model):
    """A `Segmenter` with its labels as a FiftyOne model: images -> `fiftyone.Segmentation`.

    Attributes:
        mask_targets: value in a mask -> label. Known once an image was segmented.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter
        self.mask_targets: dict[int, str] = {}

    @property
    def media_type(self) -> str:
        return "image"

    @property
    def ragged_batches(self) -> bool:
        """False: `predict_all` takes images of different sizes together."""
        return False

    @property
    def transforms(self) -> None:
        """None: the segmenter prepares images."""

    @property
    def preprocess(self) -> bool:
        return False

    def predict(self, arg: np.ndarray) -> Any:
        return self._label(self.segmenter(arg))

    def predict_all(self, args: Any) -> list[Any]:
        return [self._label(found) for found in self.segmenter(list(args))]

    def _label(self, found: Segmentation) -> Any:
        label, self.mask_targets = to_fiftyone(found)
        return label


def apply(dataset: Any, segmenter: Segmenter, field: str = "groupvit", batch_size: int = 8) -> None:
    """Segments the images of a data set into a field, and tells the data set what the values of masks mean."""
    model = SegmenterModel(segmenter)
    dataset.apply_model(model, label_field=field, batch_size=batch_size)
    dataset.mask_targets = {**dataset.mask_targets, field: model.mask_targets}
    dataset.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of images")
    parser.add_argument("--labels", required=True)
    parser.add_argument("--background-labels", default="")
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    segmenter = Segmenter.from_pretrained(
        options.model, labels=options.labels, background_labels=options.background_labels
    )
    dataset = fo.Dataset.from_images_dir(options.folder)
    apply(dataset, segmenter)
    fo.launch_app(dataset).wait()


if __name__ == "__main__":
    main()
