"""A Gradio Space: type labels, and a photo's pixels take them.

pip install -r examples/space/requirements.txt
python examples/space/app.py
"""

import os
from functools import cache
from typing import Any

import numpy as np

from groupvit_common.data.scenes import make_scene
from groupvit_common.errors import InputError
from groupvit_torch import Segmenter

MODEL = os.environ.get("GROUPVIT_MODEL", "demo")
# What the bundled model knows; others know what their captions told.
LABELS = "red, orange, yellow, green, cyan, blue, purple, pink" if MODEL == "demo" else "cat, dog | puppy, person"
BACKGROUND = "grass, sand, water, bricks, wood, clouds" if MODEL == "demo" else "sky, grass, wall"


@cache
def segmenter() -> Segmenter:
    return Segmenter.from_pretrained(MODEL)


def segment(image: Any, labels: str, background_labels: str, threshold: float) -> tuple[Any, dict[str, str]]:
    """Returns the image with a mask for each label, as `gradio.AnnotatedImage` shows it, and the colours of labels.

    Raises:
        InputError: no image, labels that cannot be used.
    """
    if image is None:
        raise InputError("Choose a photo first.")
    found = segmenter().with_labels(labels, background_labels, background=threshold or None)(image)
    shown = [name for i, name in enumerate(found.labels) if i != found.background and (found.label_map == i).any()]
    colours = {name: f"#{bytes(colour).hex()}" for name, colour in zip(found.labels, found.colours(), strict=True)}
    return (np.asarray(found.image), [(found.mask(name), name) for name in shown]), colours


def page() -> Any:
    """Returns the page, a `gradio.Blocks`."""
    import gradio as gr

    def answer(*given: Any) -> Any:
        try:
            value, colours = segment(*given)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return gr.AnnotatedImage(value, color_map=colours)

    with gr.Blocks(title="groupvit") as blocks:
        gr.Markdown("# Segment a photo by words\nLabels are separated by commas, synonyms by `|`.")
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="numpy", label="Photo")
                labels = gr.Textbox(LABELS, label="Labels")
                background = gr.Textbox(BACKGROUND, label="Labels of the background")
                threshold = gr.Slider(0, 1, 0, step=0.01, label="Background below this score (0: off)")
                button = gr.Button("Segment", variant="primary")
            result = gr.AnnotatedImage(label="Labels")
        button.click(answer, [image, labels, background, threshold], result, api_name="segment")
        if MODEL == "demo":
            gr.Examples([[make_scene(2022, i, 1, (128, 168)).image] for i in range(3)], [image])
    return blocks


if __name__ == "__main__":
    page().launch()
