"""The examples of transformers' GroupViT documentation (4.x and 5.x), with nothing changed but their import lines.

They load "nvidia/groupvit-gcc-yfcc" from the hub and a photo from the network. A hub on this machine serves a small
random model under that name, and the photo's address is answered with a file, so every line runs as a user types it.
"""

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.preprocessing.tokenizer import CLIPTokenizer
from groupvit_torch import GroupViTModel
from tests.support.fake_hub import FakeHub, point_to

CAPTIONS = ["a photo of a cat", "a photo of a dog", "two cats on a couch"]

TEXT_MODEL = """
from transformers import CLIPTokenizer, GroupViTTextModel

tokenizer = CLIPTokenizer.from_pretrained("nvidia/groupvit-gcc-yfcc")
model = GroupViTTextModel.from_pretrained("nvidia/groupvit-gcc-yfcc")
inputs = tokenizer(["a photo of a cat", "a photo of a dog"], padding=True, return_tensors="pt")
outputs = model(**inputs)
last_hidden_state = outputs.last_hidden_state
pooled_output = outputs.pooler_output  # pooled (EOS token) states
"""

VISION_MODEL = """
from PIL import Image
import requests
from transformers import AutoProcessor, GroupViTVisionModel

processor = AutoProcessor.from_pretrained("nvidia/groupvit-gcc-yfcc")
model = GroupViTVisionModel.from_pretrained("nvidia/groupvit-gcc-yfcc")
url = "http://images.cocodataset.org/val2017/000000039769.jpg"
image = Image.open(requests.get(url, stream=True).raw)
inputs = processor(images=image, return_tensors="pt")
outputs = model(**inputs)
last_hidden_state = outputs.last_hidden_state
pooled_output = outputs.pooler_output
"""

TEXT_FEATURES = """
from transformers import CLIPTokenizer, GroupViTModel

model = GroupViTModel.from_pretrained("nvidia/groupvit-gcc-yfcc")
tokenizer = CLIPTokenizer.from_pretrained("nvidia/groupvit-gcc-yfcc")
inputs = tokenizer(["a photo of a cat", "a photo of a dog"], padding=True, return_tensors="pt")
text_features = model.get_text_features(**inputs)
"""

IMAGE_FEATURES = """
import torch
from transformers import AutoProcessor, GroupViTModel
from transformers.image_utils import load_image

model = GroupViTModel.from_pretrained("nvidia/groupvit-gcc-yfcc")
processor = AutoProcessor.from_pretrained("nvidia/groupvit-gcc-yfcc")
url = "http://images.cocodataset.org/val2017/000000039769.jpg"
image = load_image(url)
inputs = processor(images=image, return_tensors="pt")
with torch.inference_mode():
    image_features = model.get_image_features(**inputs)
"""

FULL_MODEL = """
from PIL import Image
import requests
from transformers import AutoProcessor, GroupViTModel

model = GroupViTModel.from_pretrained("nvidia/groupvit-gcc-yfcc")
processor = AutoProcessor.from_pretrained("nvidia/groupvit-gcc-yfcc")
url = "http://images.cocodataset.org/val2017/000000039769.jpg"
image = Image.open(requests.get(url, stream=True).raw)
inputs = processor(
    text=["a photo of a cat", "a photo of a dog"], images=image, return_tensors="pt", padding=True
)
outputs = model(**inputs)
logits_per_image = outputs.logits_per_image
probs = logits_per_image.softmax(dim=1)
"""

TEXT_MODEL_AUTO = TEXT_MODEL.replace("CLIPTokenizer", "AutoTokenizer")

SEGMENTATION = (
    FULL_MODEL
    + """
outputs = model(**inputs, output_segmentation=True)
segmentation_logits = outputs.segmentation_logits
"""
)


# TensorFlow's examples (4.x) differ in the classes' prefix, `return_tensors`, and how probabilities are made.
def _for_tensorflow(example: str) -> str:
    for name in ("GroupViTTextModel", "GroupViTVisionModel", "GroupViTModel", "GroupViTTextConfig"):
        example = example.replace(f", {name}", f", TF{name}").replace(f" {name}.", f" TF{name}.")
    example = example.replace('return_tensors="pt"', 'return_tensors="tf"')
    return example.replace(
        "probs = logits_per_image.softmax(dim=1)",
        "import tensorflow as tf\nprobs = tf.math.softmax(logits_per_image, axis=1)",
    )


TF_IMAGE_FEATURES = """
from PIL import Image
import requests
from transformers import AutoProcessor, TFGroupViTModel

model = TFGroupViTModel.from_pretrained("nvidia/groupvit-gcc-yfcc")
processor = AutoProcessor.from_pretrained("nvidia/groupvit-gcc-yfcc")
url = "http://images.cocodataset.org/val2017/000000039769.jpg"
image = Image.open(requests.get(url, stream=True).raw)
inputs = processor(images=image, return_tensors="tf")
image_features = model.get_image_features(**inputs)
"""

# As the generic note on inputs says it: everything in the first positional argument.
TF_INPUT_FORMS = """
from transformers import CLIPTokenizer, TFGroupViTTextModel

tokenizer = CLIPTokenizer.from_pretrained("nvidia/groupvit-gcc-yfcc")
model = TFGroupViTTextModel.from_pretrained("nvidia/groupvit-gcc-yfcc")
inputs = tokenizer(["a photo of a cat", "a photo of a dog"], padding=True, return_tensors="tf")
single = model(inputs["input_ids"]).pooler_output
listed = model([inputs["input_ids"], inputs["attention_mask"]]).pooler_output
as_dictionary = model({"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}).pooler_output
whole_encoding = model(inputs).pooler_output
"""

CONFIGURATIONS = """
from transformers import GroupViTTextConfig, GroupViTTextModel, GroupViTVisionConfig, GroupViTVisionModel

configuration = GroupViTTextConfig()
model = GroupViTTextModel(configuration)
configuration = model.config
text_width = configuration.hidden_size
configuration = GroupViTVisionConfig()
model = GroupViTVisionModel(configuration)
configuration = model.config
vision_width = configuration.hidden_size
"""


def with_new_imports(code: str, package: str = "groupvit_torch") -> str:
    """Returns the example with "transformers" changed to the package's name in its import lines, and nowhere else."""
    lines = code.splitlines()
    return "\n".join(
        line.replace("transformers.image_utils", package).replace("transformers", package)
        if line.startswith(("from transformers", "import transformers"))
        else line
        for line in lines
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with the published model's image size and files."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tokenizer = CLIPTokenizer.train(CAPTIONS, vocab_size=600, model_max_length=77)
    GroupViTProcessor(GroupViTImageProcessor(), tokenizer).save_pretrained(directory)
    config = GroupViTConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
        },
        vision_config={"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2}
        | {"depths": [1, 1], "num_group_tokens": [8, 0], "num_output_groups": [8, 8]},
        projection_dim=8,
        projection_intermediate_dim=12,
    )
    GroupViTModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def internet(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    image_file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(image_file, "PNG")

    def get(url: str, **_: Any) -> SimpleNamespace:
        assert url.startswith("http://images.cocodataset.org/")
        return SimpleNamespace(raw=io.BytesIO(image_file.getvalue()))

    monkeypatch.setitem(sys.modules, "requests", SimpleNamespace(get=get))
    monkeypatch.setattr("groupvit_common.preprocessing.images.download", lambda address: image_file.getvalue())
    with FakeHub() as fake:
        point_to(fake.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        fake.add("nvidia/groupvit-gcc-yfcc", {path.name: path.read_bytes() for path in checkpoint.iterdir()})
        yield fake
        huggingface_hub.close_session()


SHAPES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "text": (TEXT_MODEL, {"last_hidden_state": (2, 7, 16), "pooled_output": (2, 16)}),
    "text-auto-tokenizer": (TEXT_MODEL_AUTO, {"last_hidden_state": (2, 7, 16), "pooled_output": (2, 16)}),
    "vision": (VISION_MODEL, {"last_hidden_state": (1, 8, 24), "pooled_output": (1, 24)}),
    "text-features": (TEXT_FEATURES, {"text_features": (2, 8)}),
    "image-features": (IMAGE_FEATURES, {"image_features": (1, 8)}),
    "full": (SEGMENTATION, {"logits_per_image": (1, 2), "probs": (1, 2), "segmentation_logits": (1, 2, 224, 224)}),
}


def run(code: str, shapes: dict[str, tuple[int, ...]]) -> None:
    variables: dict[str, Any] = {}
    exec(code, variables)
    for name, shape in shapes.items():
        assert tuple(variables[name].shape) == shape, name
        assert np.isfinite(np.asarray(variables[name].detach() if "torch" in code else variables[name])).all(), name


@pytest.mark.parametrize("name", SHAPES)
def test_the_example_runs(internet: FakeHub, name: str) -> None:
    example, shapes = SHAPES[name]
    run(with_new_imports(example), shapes)


@pytest.mark.parametrize("name", [*(name for name in SHAPES if name != "text-auto-tokenizer"), "input-forms"])
def test_the_tensorflow_example_runs(internet: FakeHub, name: str) -> None:
    example, shapes = SHAPES.get(
        name, (TF_INPUT_FORMS, dict.fromkeys(("single", "listed", "as_dictionary", "whole_encoding"), (2, 16)))
    )
    code = TF_IMAGE_FEATURES if name == "image-features" else _for_tensorflow(example)
    assert name == "input-forms" or "TFGroupViT" in code
    run(with_new_imports(code, "groupvit_tf"), shapes)


@pytest.mark.parametrize("package", ["groupvit_torch", pytest.param("groupvit_tf", marks=pytest.mark.slow)])
def test_the_configuration_example_runs(package: str) -> None:
    variables: dict[str, Any] = {}
    code = (
        CONFIGURATIONS if package == "groupvit_torch" else re.sub(r"(?<!\w)(GroupViT\w+Model)", r"TF\1", CONFIGURATIONS)
    )
    exec(with_new_imports(code, package), variables)
    assert (variables["text_width"], variables["vision_width"]) == (256, 384)
