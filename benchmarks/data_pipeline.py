"""Images per second of the data pipeline alone, by worker processes: from reading and decoding to batches.

    python -m benchmarks.data_pipeline                      synthetic images of 256 pixels on the shorter side
    python -m benchmarks.data_pipeline --shards 'cc3m/{00000..00003}.tar'

Run it on the machine that is to train, with nothing else running.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from groupvit_common.cli import terminal
from groupvit_common.cli.parser import Parser
from groupvit_common.data.captions.settings import DataSettings, SourceSettings
from groupvit_common.data.captions.stream import CaptionStream
from groupvit_common.preprocessing.processor import GroupViTProcessor

DEMO_MODEL = Path(__file__).parents[1] / "groupvit_common" / "demo_model"

CAPTIONS = (
    "a brown dog runs along the beach with a yellow ball in its mouth",
    "festive lights hang over a narrow street in the old town at night",
    "person walks by the river on an autumn morning",
    "interior of a modern kitchen with a wooden table, four chairs and a large window",
)
SHARDS, EACH = 4, 2500


def main() -> None:
    """Prints a table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--shards", help="tar shards to read; synthetic ones if not given")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="numbers of worker processes to try"
    )
    parser.add_argument("--batch", type=int, default=64, help="images of a batch")
    parser.add_argument("--images", type=int, default=2560, help="images to time, for each number of workers")
    parser.add_argument("--size", type=int, default=224, help="side of the images that the model is given")
    parser.add_argument("--runs", type=int, default=3, help="repetitions, of which the fastest counts")
    arguments = parser.parse_args()
    with nullcontext(arguments.shards) if arguments.shards else synthetic_shards() as path:
        settings = DataSettings(
            sources=(SourceSettings(kind="webdataset", path=path),), image_size=arguments.size, prompts=3
        )
        measure(settings, arguments)


def measure(settings: DataSettings, arguments: argparse.Namespace) -> None:
    """Measures the pipeline by workers, its parts in one process, and the time to resume."""
    processor = GroupViTProcessor.from_pretrained(DEMO_MODEL)
    print(f"{os.cpu_count()} cores; batches of {arguments.batch} at {arguments.size} pixels")
    print(f"{'workers':>7}  {'images/s':>8}  {'CPU ms an image':>15}  {'of these in the main process':>28}")
    for workers in arguments.workers:
        speed, all_cpu, main_cpu = max(timed(settings, processor, workers, arguments) for _ in range(arguments.runs))
        print(f"{workers:7}  {speed:8.0f}  {all_cpu:15.2f}  {main_cpu:28.2f}")

    plain = {"crop_scale": None, "flip": 0.0, "rand_augment": 0, "color_jitter": 0.0, "erasing": 0.0, "prompts": 0}
    steps = {
        "read, decode, resize, normalise, tokens": plain,
        "  and random crops": plain | {"crop_scale": (0.08, 1.0)},
        "  and flips, RandAugment, erasing": {"prompts": 0},
        "  and nouns and prompts": {},
    }
    print("\nCPU ms an image, in one process")
    for name, changes in steps.items():
        chosen = replace(settings, **changes)  # type: ignore[arg-type]
        cpu = min(timed(chosen, processor, 0, arguments)[1] for _ in range(arguments.runs))
        print(f"{cpu:7.2f}  {name}")

    stream = CaptionStream(settings, processor, batch_size=arguments.batch, seed=0)
    batches = iter(stream)
    for _ in range(5):
        next(batches)
    state = stream.state_dict()
    batches.close()
    later = CaptionStream(settings, processor, batch_size=arguments.batch, seed=0)
    later.load_state_dict(state)
    start = time.perf_counter()
    batches = iter(later)
    next(batches)
    print(f"\nresumed, first batch after {time.perf_counter() - start:.2f} s")
    batches.close()


def timed(
    settings: DataSettings, processor: GroupViTProcessor, workers: int, arguments: argparse.Namespace
) -> tuple[float, float, float]:
    """Returns images/s, and CPU ms an image of all processes and of this one."""
    count = max(arguments.images // arguments.batch, 1)
    stream = CaptionStream(settings, processor, batch_size=arguments.batch, seed=0, workers=workers)
    children = cpu_seconds(resource.RUSAGE_CHILDREN)
    batches = iter(stream)
    # By then batches made ahead are waiting, and the second pool of shards is listed.
    warm = 8
    for _ in range(warm):
        next(batches)
    here, start = cpu_seconds(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds, here = time.perf_counter() - start, cpu_seconds(resource.RUSAGE_SELF) - here
    batches.close()
    # The time of workers is known once they have ended: it is for all images that they made.
    children = cpu_seconds(resource.RUSAGE_CHILDREN) - children
    images = count * arguments.batch
    made = images + warm * arguments.batch
    return images / seconds, 1e3 * (here / images + children / made), 1e3 * here / images


def cpu_seconds(whose: int) -> float:
    """Returns the CPU time used so far."""
    usage = resource.getrusage(whose)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def synthetic_shards() -> Iterator[str]:
    """Writes shards of 256 images, over and over, in img2dataset's layout; removes them afterwards."""
    rng = np.random.default_rng(0)
    images = [synthetic_image(rng) for _ in range(256)]
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(SHARDS):
            with tarfile.open(Path(folder) / f"{shard:05d}.tar", "w") as tar:
                for number in range(EACH):
                    caption = CAPTIONS[number % len(CAPTIONS)]
                    parts = {"jpg": images[number % len(images)], "json": b"{}", "txt": caption.encode()}
                    for suffix, content in parts.items():
                        member = tarfile.TarInfo(f"{shard:05d}{number:04d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        size = sum(map(len, images)) / len(images) / 1000
        print(f"{SHARDS} shards of {EACH} synthetic images, 341 x 256, JPEG of {size:.0f} kB")
        yield f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar"


def synthetic_image(rng: np.random.Generator) -> bytes:
    """Returns a JPEG with structure at every scale, as photographs have."""
    total = np.zeros((256, 341, 3), np.float32)
    for scale in (2, 4, 8, 16, 32, 64):
        noise = Image.fromarray(rng.integers(0, 256, (256 // scale + 2, 341 // scale + 2, 3), np.uint8))
        total += np.asarray(noise.resize((341, 256), Image.Resampling.BICUBIC), np.float32) * scale
    total = (total - total.min()) * (255 / np.ptp(total))
    file = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(terminal.run(main))
