"""Workloads of `benchmarks.speed`: which calls, of which peers, on which inputs, and the work each has to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

LABELS, LONGEST, SHORT, CAPTION = 20, 77, 8, 20
START, END = 638, 639  # of the bundled model's tokenizer, whose texts `Segmenter` reads

TORCH = ("groupvit", "transformers 5")
EXPORTED = ("openvino", "onnxruntime")
TENSORFLOW = ("groupvit tf", "transformers tf")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One call. peers: the first is ours; the ratio of every other to it is given.

    tokens: of each text, which the work is counted by; backward: a training step, three times the forward work.
    tolerance: of answers, relative to the largest; dtype: of the GEMM peak it is compared with.
    """

    title: str
    kind: str
    peers: tuple[str, ...]
    images: int = 0
    texts: int = 0
    tokens: int = 0
    backward: bool = False
    dtype: str = "float32"
    tolerance: float = 1e-3
    slow: bool = False
    memory: bool = False


def _all() -> dict[str, Workload]:
    found: dict[str, Workload] = {}
    for count in (1, 8, 32):
        image: dict[str, Any] = {"kind": "image", "images": count, "slow": count == 32}
        found[f"image{count}"] = Workload(title=f"image features, batch {count}", peers=(*TORCH, *EXPORTED), **image)
        found[f"image{count}_bf16"] = Workload(
            title=f"image features, bfloat16, batch {count}", peers=(*TORCH, "openvino"), dtype="bfloat16",
            tolerance=0.1, **image,
        )  # fmt: skip
        found[f"image{count}_fast"] = Workload(
            title=f"image features, optimize(model) against float32, batch {count}",
            peers=("groupvit fast", "transformers 5"), tolerance=0.1, **image,
        )  # fmt: skip
    for name, title, length in (
        ("short", "short, padded to 77", SHORT),
        ("tight", "short, not padded", SHORT),
        ("long", "all long", LONGEST),
    ):
        found[f"text_{name}"] = Workload(
            title=f"{LABELS} texts, {title}", kind=f"text_{name}", peers=TORCH, texts=LABELS, tokens=length
        )
    for count in (1, 8):
        found[f"segmentation{count}"] = Workload(
            title=f"segmentation logits, batch {count}, {LABELS} padded labels", kind="segmentation", peers=TORCH,
            images=count, texts=LABELS, tokens=SHORT, slow=count == 8, memory=count == 8,
        )  # fmt: skip
        # Label maps of two meanings: `Segmenter`'s, photo and all, and the largest of transformers' logits.
        found[f"segmentation{count}_kept"] = Workload(
            title=f"label maps, batch {count}: Segmenter, which keeps the texts, against logits with {LABELS} padded "
            "labels", kind="kept", peers=TORCH, images=count, texts=0, tolerance=1.0, slow=count == 8,
        )  # fmt: skip
    for count in (16, 64):
        for dtype in ("float32", "bfloat16"):
            found[f"step{count}_{'f32' if dtype == 'float32' else 'bf16'}"] = Workload(
                title=f"training step, batch {count}, {dtype}", kind="step", peers=TORCH, images=count, texts=count,
                tokens=CAPTION + 1, backward=True, dtype=dtype, tolerance=1e-3 if dtype == "float32" else 0.1,
                slow=count == 64, memory=count == 64 and dtype == "float32",
            )  # fmt: skip
    for name, title, kind, images, texts in (
        ("image1", "image features, batch 1", "image", 1, 0),
        ("image8", "image features, batch 8", "image", 8, 0),
        ("text", f"{LABELS} padded texts", "text_short", 0, LABELS),
        ("segmentation", f"segmentation logits, batch 1, {LABELS} padded labels", "segmentation", 1, LABELS),
    ):
        for mode in ("graph", "eager"):
            if mode == "graph" or images:
                found[f"tf_{mode}_{name}"] = Workload(
                    title=f"TensorFlow {mode}: {title}", kind=f"{mode}_{kind}", peers=TENSORFLOW, images=images,
                    texts=texts, tokens=SHORT,
                )  # fmt: skip
    found["pixels"] = Workload(
        title="640x480 image to pixel values", kind="pixels", peers=("groupvit", "transformers 4")
    )
    found["load"] = Workload(title="loading the full-size model", kind="load", peers=TORCH)
    found["tf_load"] = Workload(title="TensorFlow: loading the full-size model", kind="load", peers=TENSORFLOW)
    found["photos"] = Workload(title="eight photos through Segmenter", kind="photos", peers=("groupvit", "groupvit tf"))
    return found


WORKLOADS = _all()


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 3, 224, 224), np.float32)


def photos(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(count).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8))


def texts(count: int, length: int, padded: int = LONGEST) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and masks `[count, padded]` of texts of `length` tokens, start and end among them."""
    ids = np.random.default_rng(length).integers(1, START, (count, padded), dtype=np.int64)
    ids[:, 0] = START
    ids[:, length - 1 :] = END
    return ids, np.broadcast_to((np.arange(padded) < length).astype(np.int64), ids.shape).copy()


def texts_of(kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    if kind.endswith("tight"):
        return texts(count, SHORT, SHORT)
    return texts(count, LONGEST if kind.endswith("long") else CAPTION + 1 if kind == "step" else SHORT)
