"""Segments the images of a folder on all machines of a Ray cluster, or on this one.

pip install "ray[data]" "groupvit[torch]"
python examples/ray_batch.py photos/ segmented/ --labels "cat, couch, remote control" --actors 4
"""

import argparse
from pathlib import Path

import numpy as np
import ray


class SegmentImages:
    """An actor: loads the model once, then takes batches."""

    def __init__(self, model: str, labels: str, out: str, device: str | None):
        from groupvit_torch import Segmenter

        self.segmenter = Segmenter.from_pretrained(model, labels=labels, device=device)
        self.out = out

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        rows: dict[str, list] = {"path": [], "error": [], "shares": []}
        paths = [str(path) for path in batch["path"]]
        failed: dict[str, str] = {}
        results = self.segmenter.iter(paths, on_error=lambda path, error: failed.update({path: str(error)}))
        done = {result.source: result for result in results}
        for path in paths:
            if path in done:
                done[path].save_as(self.out, Path(path).name)
            shares = [score.pixel_share for score in done[path].scores] if path in done else []
            rows["path"].append(path)
            rows["error"].append(failed.get(path, ""))
            rows["shares"].append(shares)
        return rows


def segment(paths: list[str], model: str, labels: str, out: str, *, actors: int, gpus: float = 0) -> list[dict]:
    """Returns a row for each image: path, error ("" for none), share of the pixels of each label."""
    rows = ray.data.from_items(
        [{"path": path} for path in paths], override_num_blocks=max(1, min(len(paths), 4 * actors))
    )
    device = "cuda" if gpus else "cpu"
    found = rows.map_batches(
        SegmentImages,
        fn_constructor_args=(model, labels, out, device),
        batch_size=16,
        num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    return sorted(found.take_all(), key=lambda row: row["path"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", help="a folder that all machines share")
    parser.add_argument("--labels", required=True)
    parser.add_argument("--model", default="nvidia/groupvit-gcc-yfcc")
    parser.add_argument("--actors", type=int, default=1, help="number of models in memory")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor; 0: it computes on CPUs")
    options = parser.parse_args(arguments)
    paths = [str(path.resolve()) for path in sorted(options.folder.iterdir()) if path.is_file()]
    out = str(Path(options.out).resolve())
    rows = segment(paths, options.model, options.labels, out, actors=options.actors, gpus=options.gpus)
    for row in rows:
        if row["error"]:
            print(row["error"])
    print(f"{sum(not row['error'] for row in rows)} of {len(rows)} images are in {out}")


if __name__ == "__main__":
    main()
