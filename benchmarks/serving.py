"""CPU time of `groupvit serve` for a new image, new labels and a slider, over HTTP: python -m benchmarks.serving.

The CPU's time is counted, of all threads of the server, since other programs do not change it as much as they change
how long an answer takes. `--clients` asks from so many threads at once for a minute, and counts answers and memory.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from groupvit_common.data.scenes import make_scene
from groupvit_common.serving import Client

LABELS = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]
FIRST, TIMES, IMAGES, SECONDS = 5, 20, 5, 60


def main() -> None:
    """Prints milliseconds of CPU for each kind of request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--clients", type=int, default=0)
    options = parser.parse_args()
    command = [sys.executable, "-m", "groupvit_common.cli", "serve", "--model", options.model, "--port", "0"]
    command += ["--backend", options.backend, "--labels", "red, green"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http\S+", process.stdout.readline())
            assert found is not None, "the server did not start"
            client = Client(found[0], tries=1000)
            measure(client, process.pid)
            if options.clients:
                crowd(client, process.pid, options.clients)
        finally:
            process.terminate()


def measure(client: Client, pid: int) -> None:
    """Prints the CPU's time of each kind of request about an image of 640 x 480 pixels."""
    kept = client.add_image(photo(0))
    for number in range(FIRST):
        # Graphs are traced, and kernels chosen, in the first calls.
        client.segment(photo(-1 - number), [*LABELS, f"first {number}"], background_labels="grass")
    kinds: dict[str, tuple[int, Callable[[int], object]]] = {
        "a slider": (TIMES, lambda n: client.segment(kept, LABELS, background_labels="grass", background=0.02 * n)),
        "a new label": (TIMES, lambda n: client.segment(kept, [*LABELS, f"word {n}"], background_labels="grass")),
        "a new image": (IMAGES, lambda n: client.segment(photo(n + 1), LABELS, background_labels="grass")),
    }
    for name, (times, request) in kinds.items():
        before, start = cpu_seconds(pid), time.perf_counter()
        for number in range(times):
            request(number)
        cpu, wall = cpu_seconds(pid) - before, time.perf_counter() - start
        print(f"{name}: {1000 * cpu / times:.0f} ms of CPU, {1000 * wall / times:.0f} ms")


def crowd(client: Client, pid: int, clients: int) -> None:
    """Prints the answers that so many clients get in a minute, each with an image of its own and ever other labels."""
    before, end = resident_megabytes(pid), time.monotonic() + SECONDS

    def work(number: int) -> int:
        done, kept = 0, client.add_image(photo(number))
        while time.monotonic() < end:
            client.segment(kept, LABELS[: 1 + done % 8], background=0.1 * (done % 5))
            done += 1
        return done

    with ThreadPoolExecutor(clients) as pool:
        answers = sum(pool.map(work, range(clients)))
    print(f"{clients} clients for {SECONDS} s: {answers} answers; memory {before} -> {resident_megabytes(pid)} MB")


def photo(seed: int) -> bytes:
    """Returns a synthetic scene as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(make_scene(3, 1000 + seed, 1, (480, 640)).image).save(file, "JPEG", quality=90)
    return file.getvalue()


def cpu_seconds(pid: int) -> float:
    """Returns the CPU's time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_megabytes(pid: int) -> int:
    """Returns the memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1_000_000


if __name__ == "__main__":
    main()
