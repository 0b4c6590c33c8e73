"""A Label Studio ML backend: brush labels for images, by the names in the labelling configuration.

See README.md for how it is started.
"""

from __future__ import annotations

import inspect
import logging
import os
from functools import cache
from typing import Any

from label_studio_ml.model import LabelStudioMLBase

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.prompts import Label
from groupvit_common.segmentation.adapters import to_label_studio
from groupvit_torch import Segmenter

MODEL = os.environ.get("GROUPVIT_MODEL", "demo")
# A number between 0 and 1: pixels that score less have no label.
BACKGROUND = float(os.environ["GROUPVIT_BACKGROUND"]) if os.environ.get("GROUPVIT_BACKGROUND") else None
log = logging.getLogger(__name__)


@cache
def segmenter() -> Segmenter:
    return Segmenter.from_pretrained(MODEL)


class GroupViTBackend(LabelStudioMLBase):  # type: ignore[misc]
    """Labels images by what `<BrushLabels>` of the configuration lists; `predicted_values` of a label are its
    synonyms. A label that is called "background" has no mask."""

    def predict(self, tasks: list[dict[str, Any]], context: Any = None, **_: Any) -> list[dict[str, Any]]:
        """Returns a prediction for each task; an image that cannot be read has none of its pixels labelled."""
        from_name, to_name, key, labels = brush_labels(self.parsed_label_config)
        chosen = segmenter().with_labels(labels, background=BACKGROUND)
        predictions = []
        for task in tasks:
            try:
                found = chosen(self._file(task["data"][key], task.get("id")))
            except (InputError, OSError) as error:
                log.warning("task %s: %s", task.get("id"), error)
                predictions.append({"result": [], "score": 0.0, "model_version": f"groupvit {MODEL}"})
                continue
            regions = to_label_studio(found, from_name=from_name, to_name=to_name)
            scores = [region["score"] for region in regions]
            score = sum(scores) / len(scores) if scores else 0.0
            predictions.append({"result": regions, "score": score, "model_version": f"groupvit {MODEL}"})
        return predictions

    def _file(self, url: str, task_id: Any) -> str:
        """Returns the file of a task's image, which Label Studio's tools fetch from wherever it is."""
        # Version 1 has no argument for the task, which storage in a cloud needs.
        knows_task = "task_id" in inspect.signature(self.get_local_path).parameters
        path: str = self.get_local_path(url, **({"task_id": task_id} if knows_task else {}))
        return path


def brush_labels(config: dict[str, Any]) -> tuple[str, str, str, list[Label]]:
    """Returns of a parsed configuration the names of `<BrushLabels>` and of its `<Image>`, the key of the image in a
    task's data, and the labels.

    Raises:
        InputError: it has no `<BrushLabels>` on an `<Image>`, or no labels in it.
    """
    for name, control in config.items():
        images = [source for source in control["inputs"] if source["type"] == "Image"]
        if control["type"] == "BrushLabels" and images:
            about = control.get("labels_attrs") or {}
            labels = [
                Label(label, synonyms(label, about.get(label, {}).get("predicted_values", "")))
                for label in control["labels"]
            ]
            if not labels:
                raise InputError(f"<BrushLabels name={name!r}> has no labels: add <Label value=.../> to it")
            return name, control["to_name"][0], images[0]["value"], labels
    raise InputError("the labelling configuration has no <BrushLabels> on an <Image>: add them")


def synonyms(label: str, values: str) -> tuple[str, ...]:
    words = dict.fromkeys(word.strip() for word in values.split(","))
    return tuple(word for word in words if word and word.casefold() != label.casefold())
