"""The process of one peer: makes its model once and runs the calls that `benchmarks.speed` names, one a line."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import LABELS, WORKLOADS, Workload, photos, pixels, texts_of

Call = Callable[[], Any]


def make_call(peer: str, workload: Workload, folder: Path, kept: dict[str, Any]) -> tuple[Call, Call]:
    """Returns what is timed, and what gives the numbers that peers must agree on."""
    if workload.kind == "pixels":
        return pixels_call(peer)
    if workload.kind == "photos":
        return photos_call(peer, folder)
    if workload.kind == "load":
        return load_call(peer, folder)
    if workload.kind == "kept" and peer == "groupvit":
        return segmenter_call(workload, folder)
    if peer in ("openvino", "onnxruntime"):
        return exported_call(peer, workload, folder, kept)
    return (tensorflow_call if peer.endswith("tf") else torch_call)(peer, workload, folder, kept)


def torch_call(peer: str, workload: Workload, folder: Path, kept: dict[str, Any]) -> tuple[Call, Call]:
    import torch

    model_class = __import__("groupvit_torch" if peer.startswith("groupvit") else "transformers").GroupViTModel
    if "model" not in kept:
        kept["model"] = model_class.from_pretrained(str(folder)).eval()
    model = kept["model"]
    if peer == "groupvit fast":
        if "fast" not in kept:
            import importlib

            kept["fast"] = importlib.import_module("groupvit_torch.optimize").optimize(model)[0]
        model = kept["fast"]
    half = workload.dtype == "bfloat16"
    if half and not workload.backward:
        if "half" not in kept:
            kept["half"] = model_class.from_pretrained(str(folder)).eval().to(torch.bfloat16)
        model = kept["half"]
    given: dict[str, Any] = {}
    if workload.images:
        given["pixel_values"] = torch.from_numpy(pixels(workload.images)).to(model.dtype)
    count = LABELS if workload.kind == "kept" else workload.texts
    if count:
        ids, mask = texts_of(workload.kind, count)
        given |= {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}

    def features(found: Any) -> Any:
        return getattr(found, "pooler_output", found)

    def forward() -> Any:
        with torch.no_grad():
            if workload.kind == "image":
                return features(model.get_image_features(**given))
            if workload.kind == "segmentation":
                return model(**given, output_segmentation=True).segmentation_logits
            if workload.kind == "kept":
                return model(**given, output_segmentation=True).segmentation_logits.argmax(1)
            return features(model.get_text_features(**given))

    def step() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = model(**given, return_loss=True).loss
        loss.backward()
        return loss

    def timed_step() -> None:
        model.train()
        step()
        model.zero_grad()
        model.eval()

    def answer_step() -> Any:
        loss = step()
        squares = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
        model.zero_grad()
        return np.asarray([float(loss.detach()), squares**0.5])

    if workload.backward:
        return timed_step, answer_step
    return forward, lambda: (found.float() if (found := forward()).is_floating_point() else found).numpy()


def tensorflow_call(peer: str, workload: Workload, folder: Path, kept: dict[str, Any]) -> tuple[Call, Call]:
    import tensorflow as tf

    ours = peer == "groupvit tf"
    if "model" not in kept:
        if ours:
            from groupvit_tf import GroupViTModel as Model
        else:
            from transformers import TFGroupViTModel as Model
        kept["model"] = Model.from_pretrained(str(folder))
    model = kept["model"]
    mode, kind = workload.kind.split("_", 1)
    given: dict[str, Any] = {}
    if workload.images:
        given["pixel_values"] = tf.constant(pixels(workload.images))
    if workload.texts:
        ids, mask = texts_of(kind, workload.texts)
        given |= {"input_ids": tf.constant(ids, tf.int32), "attention_mask": tf.constant(mask, tf.int32)}

    def call(**given: Any) -> Any:
        if kind == "image":
            return model.get_image_features(**given)
        if kind == "segmentation":
            return model(**given, output_segmentation=True).segmentation_logits
        return model.get_text_features(**given)

    function = tf.function(call) if mode == "graph" else call

    def run() -> Any:
        return np.asarray(getattr(found, "pooler_output", found) if (found := function(**given)) is not None else 0)

    return run, run


def exported_call(peer: str, workload: Workload, folder: Path, kept: dict[str, Any]) -> tuple[Call, Call]:
    import torch

    threads = int(os.environ["OMP_NUM_THREADS"])
    images = pixels(workload.images)
    model = kept.get("model")
    if model is None:
        from transformers import GroupViTModel

        whole = GroupViTModel.from_pretrained(str(folder), attn_implementation="eager").eval()

        class Images(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.vision, self.projection = whole.vision_model, whole.visual_projection

            def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
                return self.projection(self.vision(pixel_values).pooler_output)

        model = kept["model"] = Images().eval()
    example = torch.from_numpy(images)
    if peer == "openvino":
        import openvino

        with torch.no_grad():
            converted = openvino.convert_model(model, example_input=example)
        precision = "bf16" if workload.dtype == "bfloat16" else "f32"
        hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.Core().compile_model(converted, "CPU", hints)
        return (lambda: compiled(images)), (lambda: np.asarray(compiled(images)[0]))
    import onnxruntime

    path = folder / f"image{workload.images}.onnx"
    with torch.no_grad():
        torch.onnx.export(model, (example,), str(path), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return (lambda: session.run(None, {name: images})), (lambda: session.run(None, {name: images})[0])


def pixels_call(peer: str) -> tuple[Call, Call]:
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    if peer == "groupvit":
        from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor as Processor
    else:
        from transformers import CLIPImageProcessor as Processor
    processor = Processor()

    def run() -> Any:
        return np.asarray(processor(images=image, return_tensors="np")["pixel_values"])

    return run, run


def load_call(peer: str, folder: Path) -> tuple[Call, Call]:
    """The answer is the number of weights."""
    if peer.endswith("tf"):
        if peer == "groupvit tf":
            from groupvit_tf import GroupViTModel as Model
        else:
            from transformers import TFGroupViTModel as Model
        return (lambda: Model.from_pretrained(str(folder))), (
            lambda: np.asarray([float(Model.from_pretrained(str(folder)).count_params())])
        )
    made: Any = __import__("groupvit_torch" if peer == "groupvit" else "transformers").GroupViTModel
    return (lambda: made.from_pretrained(str(folder))), (
        lambda: np.asarray([float(sum(p.numel() for p in made.from_pretrained(str(folder)).parameters()))])
    )


def segmenter_call(workload: Workload, folder: Path) -> tuple[Call, Call]:
    from groupvit_torch import Segmenter

    labels = [f"thing {index}" for index in range(LABELS)]
    segmenter = Segmenter.from_pretrained(str(folder), labels=labels, shorter_side=224)
    images = photos(workload.images)

    def run() -> Any:
        return np.stack([found.label_map for found in segmenter(images)])

    return run, run


def photos_call(peer: str, folder: Path) -> tuple[Call, Call]:
    if peer == "groupvit":
        from groupvit_torch import Segmenter
    else:
        from groupvit_tf import Segmenter
    segmenter = Segmenter.from_pretrained(str(folder), labels=["sky", "grass", "a house", "water", "a dog"])
    photos = sorted((folder / "photos").iterdir())[:8]

    def run() -> Any:
        return [found.label_map for found in segmenter(photos)]

    return run, lambda: np.stack(run())


def peak_memory() -> float:
    """Returns the highest resident memory of this process so far, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    peer, folder = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("ignore")
    # What libraries print must not come between the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kept: dict[str, Any] = {}
    calls: dict[str, tuple[Call, Call]] = {}
    for line in sys.stdin:
        action, name = line.split()
        try:
            found: Any = None
            if action == "versions":
                from importlib.metadata import distributions

                wanted = ("torch", "transformers", "tensorflow", "keras", "openvino", "onnxruntime", "numpy", "pillow")
                names = {d.metadata["Name"].lower(): d.version for d in distributions()}
                found = {key: names[key] for key in wanted if key in names}
            else:
                if name not in calls:
                    calls[name] = make_call(peer, WORKLOADS[name], folder, kept)
                timed, answer = calls[name]
                if action == "answer":
                    path = folder / f"{peer.replace(' ', '_')}-{name}.npy"
                    np.save(path, answer())
                    found = str(path)
                elif action == "memory":
                    before = peak_memory()
                    timed()
                    found = peak_memory() - before
                elif action == "forget":
                    del calls[name]
                else:
                    gc.collect()
                    cpu, wall = time.process_time(), time.perf_counter()
                    timed()
                    found = [time.perf_counter() - wall, time.process_time() - cpu]
            reply = {"found": found}
        except Exception as error:
            reply = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
