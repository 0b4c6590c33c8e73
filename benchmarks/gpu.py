"""Speed, memory and utilisation on a GPU, beside transformers, in one run of some ten minutes.

    python -m benchmarks.gpu                      (make bench-gpu)
    python -m benchmarks.gpu --batch 1024 --seconds 300

Each case is a process of its own; what does not fit in the time left is said. Training is `benchmarks.training`'s step.
Utilisation is the operations of the configuration against the GPU's peak in the case's dtype; in float32, PyTorch uses
no TF32 unless it is told to.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import image_flops
from groupvit_common.cli import terminal
from groupvit_common.cli.parser import Parser

ROOT = Path(__file__).parents[1]
WAYS = (("float32", False), ("bfloat16", False), ("bfloat16", True))


def inference(
    model: Any, flops: float, *, batch: int, side: int, precision: str, rounds: int, peak: float
) -> dict[str, float]:
    """Returns images/s, memory in GiB and utilisation of image features; peak: TFLOP/s, 0 if it is not known."""
    device = next(model.parameters()).device
    pixels = torch.randn(batch, 3, side, side, device=device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    half = precision == "bfloat16"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        for turn in range(rounds + 3):
            if turn == 3:
                if on_gpu:
                    torch.cuda.synchronize()
                begun = time.perf_counter()
            model.get_image_features(pixel_values=pixels)
        if on_gpu:
            torch.cuda.synchronize()
    speed = batch * rounds / (time.perf_counter() - begun)
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    share = speed * flops / (peak * 1e12) if peak else 0.0
    return {"images/s": speed, "GiB": memory, "utilisation": share}


def one_case(case: dict[str, Any]) -> dict[str, float]:
    from groupvit_common.model.config import GroupViTConfig

    library = __import__(case["library"])
    torch.manual_seed(0)
    model = library.GroupViTModel(library.GroupViTConfig()).eval().cuda()
    if case["compiled"]:
        model.vision_model = torch.compile(model.vision_model)
    flops = image_flops(GroupViTConfig())
    keys = ("batch", "precision", "rounds", "peak")
    return inference(model, flops, side=224, **{key: case[key] for key in keys})


def in_a_process(command: list[str], seconds: float) -> str:
    """Returns the last line of a command, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=max(seconds, 1.0), check=False)
    except subprocess.TimeoutExpired:
        return "failed: no time left"
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or [str(done.returncode)])[-1][:200]}"
    return done.stdout.strip().splitlines()[-1]


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024], help="batch sizes (default: 256 1024)")
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="calls that are timed (default: %(default)s)")
    parser.add_argument("--peak", type=float, default=989.0, metavar="TFLOPS", help="in bfloat16, an H100's by default")
    parser.add_argument(
        "--peak-float32", type=float, default=67.0, metavar="TFLOPS", help="without TF32, an H100's by default"
    )
    parser.add_argument(
        "--transformers", metavar="PYTHON", help="with transformers (default: that of make bench-peers)"
    )
    parser.add_argument("--case", help="one measurement, as JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(one_case(json.loads(options.case))))
        return 0
    if not torch.cuda.is_available():
        print("PyTorch finds no GPU here: nothing was measured.")
        return 1
    from tests.support.peers import environment

    theirs = options.transformers or str(environment("5"))
    begun = time.monotonic()

    def left() -> float:
        return options.seconds - (time.monotonic() - begun)

    peaks = {"bfloat16": options.peak, "float32": options.peak_float32}
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, peaks in TFLOP/s: {peaks}", flush=True)
    for batch in options.batch:
        for precision, compiled in WAYS:
            for library, python in (("groupvit_torch", sys.executable), ("transformers", theirs)):
                case = {"library": library, "batch": batch, "precision": precision, "compiled": compiled}
                case |= {"rounds": options.rounds, "peak": peaks[precision]}
                found = in_a_process([python, "-m", "benchmarks.gpu", "--case", json.dumps(case)], left())
                print(f"inference {library} {batch} {precision}{' compiled' * compiled}: {found}", flush=True)
            command = [theirs, "-m", "benchmarks.training", "--transformers", "--batch", str(batch), "--precision"]
            command += [precision, "--compile", "yes" if compiled else "no", "--steps", "5"]
            command += ["--peak", str(peaks[precision])]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, cwd=ROOT, timeout=max(left(), 1.0), check=False
                )
                print(done.stdout or done.stderr[-500:], flush=True)
            except subprocess.TimeoutExpired:
                print(f"training {batch} {precision}: failed: no time left", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(terminal.run(main))
