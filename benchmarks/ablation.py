"""The paper's ablation made small (Xu et al. 2022, section 4.3): grouping variants and a ViT, on synthetic scenes.

    python -m benchmarks.ablation --out ablation.jsonl                        # six variants, three seeds; resumes
    python -m benchmarks.ablation --out ablation.jsonl --variants hard soft --seeds 0 --steps 200
    python -m benchmarks.ablation --out ablation.jsonl --table                # only the table of the results so far

All variants see the same images, captions and batches of a seed, have as many transformer layers, and are trained by
the paper's losses on the pooled image alone. Masks are measured zero-shot on validation scenes. One core is enough:
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groupvit_common.cli import terminal
from groupvit_common.cli.parser import Parser
from groupvit_common.evaluation.datasets.segmentation import open_sets
from groupvit_common.evaluation.segmentation import evaluate_segmentation
from groupvit_common.training.grouping_health import grouping_measures
from groupvit_common.training.recipe import Recipe, get_recipe
from groupvit_common.training.run import Run
from groupvit_common.training.schedule import assigns_hard, learning_rate_at
from groupvit_common.training.start import start_run
from groupvit_torch.data import Inputs
from groupvit_torch.model import GroupViTModel
from groupvit_torch.predictor import Segmenter
from groupvit_torch.train import Objective, make_optimizer, new_model, train_step

# Scenes of colours: a model learns them within a minute of a core. Close-ups and scenes of one object, since the mean
# of all patches is otherwise enough to tell captions apart; initial values as large as so narrow a model needs for
# groups to differ from the start. These settings were chosen on other scenes than those that are measured here.
SETTINGS: Mapping[str, Any] = {
    "levels": (1,), "turns": (1,), "size": 0, "scenes_per_level": 4000, "single_share": 0.3, "close_up_share": 0.4,
    "image_size": 64, "patch_size": 8, "width": 32, "heads": 2, "mlp_ratio": 2, "initializer_range": 0.17,
    "projection_width": 64, "batch_size": 64, "warmup_steps": 50, "learning_rate": 3e-3, "ema_decay": 0.0,
    "precision": "float32", "run.workers": 0, "held_out_seed": 4_000_007,
}  # fmt: skip
SOFT: Mapping[str, Any] = {"hard_from": 1.0, "gumbel": False}
ONE_STAGE: Mapping[str, Any] = {"depths": (1, 1), "groups": (8,)}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "hard": ONE_STAGE,
    "soft": {**ONE_STAGE, **SOFT},
    "hard-captions": {**ONE_STAGE, "multi_label_weight": 0.0},
    "soft-captions": {**ONE_STAGE, **SOFT, "multi_label_weight": 0.0},
    "two-stages": {"depths": (1, 1, 0), "groups": (16, 8)},
    "vit": {"depths": (2,), "groups": ()},
}
ROWS = {
    "hard": "one stage, hard assignment, multi-label",
    "soft": "one stage, soft assignment, multi-label",
    "hard-captions": "one stage, hard assignment, captions alone",
    "soft-captions": "one stage, soft assignment, captions alone",
    "two-stages": "two stages, hard assignment, multi-label",
    "vit": "ViT, multi-label, each patch by itself",
    "vit k-means": "ViT, multi-label, patches clustered by k-means",
}
CLUSTERS = 8  # as many as there are groups


class PatchSegmenter(Segmenter):
    """A segmenter of a model without groups: its patches, or clusters of them, take the groups' place."""

    clusters = 0
    """Of k-means; 0: each patch is by itself."""

    def _encode_images(self, pixels: NDArray[np.floating[Any]]) -> tuple[Tensor, Tensor, list[Tensor]]:
        vision = self.model.vision_model(torch.from_numpy(pixels).to(self.model.device))
        patches = vision.last_hidden_state  # [B, P, D]
        side = self.model.config.vision_config.patch_size
        if self.clusters:
            chosen = np.stack([k_means(each.numpy(), self.clusters) for each in patches])
            maps = torch.from_numpy(chosen[:, None] == np.arange(self.clusters)[:, None]).to(patches)  # [B, K, P]
        else:
            maps = torch.eye(patches.shape[1]).expand(len(patches), -1, -1)
        means = maps @ patches / maps.sum(dim=2, keepdim=True).clamp(min=1.0)
        groups = self.model.visual_projection(means.flatten(0, 1)).unflatten(0, means.shape[:2])
        images = self.model.visual_projection(vision.pooler_output)
        grid = (pixels.shape[2] // side, pixels.shape[3] // side)
        return groups, images, [maps.unflatten(2, grid)]


def k_means(points: NDArray[np.floating[Any]], clusters: int, rounds: int = 50, seed: int = 0) -> NDArray[np.intp]:
    """Returns the cluster `[N]` of each of `points` `[N, D]`: Lloyd's rounds from k-means++ starts until nothing moves.

    (Arthur and Vassilvitskii 2007.) A cluster that loses all its points stays where it was.
    """
    rng = np.random.default_rng(seed)
    centres = points[rng.integers(len(points))][None]
    while len(centres) < clusters:
        nearest = _distances(points, centres).min(axis=1)
        weights = nearest if nearest.sum() > 0 else np.ones(len(points))
        centres = np.concatenate([centres, points[rng.choice(len(points), p=weights / weights.sum())][None]])
    chosen = np.full(len(points), -1)
    for _ in range(rounds):
        before, chosen = chosen, _distances(points, centres).argmin(axis=1)
        if (chosen == before).all():
            break
        for number in range(clusters):
            if (chosen == number).any():
                centres[number] = points[chosen == number].mean(axis=0)
    return chosen


def _distances(points: NDArray[np.floating[Any]], centres: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Squared, `[N, K]`."""
    return np.square(points[:, None].astype(np.float64) - centres).sum(axis=2)


def recipe_of(variant: str, seed: int, steps: int, changes: Sequence[str] = ()) -> Recipe:
    settings = {**SETTINGS, "steps": steps, "run.seed": seed, **VARIANTS[variant]}
    settings["warmup_steps"] = min(settings["warmup_steps"], steps - 1)
    # A command's changes come last.
    every = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    return get_recipe("scenes-paper", [*every, *changes])


def trained(recipe: Recipe) -> tuple[Objective, Run, dict[str, float]]:
    """Trains a model by a recipe: the model, its run, the mean of the last losses and measures of its grouping."""
    with tempfile.TemporaryDirectory() as folder:
        run = start_run(recipe, folder, log=lambda line: None)
    torch.manual_seed(recipe.run.seed)
    module = Objective(new_model(recipe, run.processor), recipe)
    optimizer = make_optimizer(module)
    losses = []
    for step, batch in enumerate(islice(run.stream(), recipe.schedule.total_steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(recipe, step)
        result = train_step(module, optimizer, Inputs.of(batch), hard=assigns_hard(recipe, step))
        losses.append(result.loss)
    watched = {"loss": float(np.mean(losses[-100:]))}
    for number, assignment in enumerate(result.assignments):
        found = grouping_measures(assignment.float().numpy(), of_patches=number == 0)
        watched |= {f"{name}.{number}": value for name, value in found.items()}
    return module, run, watched


def scores(model: GroupViTModel, run: Run, clusters: int | None = None) -> dict[str, float]:
    """Measures a model on the validation scenes, in percent. clusters: of a model without groups."""
    segmenter: Segmenter
    if clusters is None:
        segmenter = Segmenter(model, run.processor, batch_size=50)
    else:
        segmenter = PatchSegmenter(model, run.processor, batch_size=50)
        segmenter.clusters = clusters
    level = run.recipe.scenes.levels[0]
    scenes = run.recipe.scenes
    (data,) = open_sets(f"scenes:{level}", split=str(scenes.held_out_seed), limit=scenes.held_out_scenes)
    result = evaluate_segmentation(segmenter, data)
    assert result is not None
    return {name: round(100 * value, 2) for name, value in result.scores().items()}


def records(variant: str, recipe: Recipe) -> list[dict[str, Any]]:
    """Returns a variant's results with a recipe, a record for each row of the table."""
    cpu = time.process_time()
    module, run, watched = trained(recipe)
    cpu = time.process_time() - cpu
    ways = {"vit": 0, "vit k-means": CLUSTERS} if variant == "vit" else {variant: None}
    return [{"row": row, **scores(module.model, run, way), **watched, "cpu_seconds": cpu} for row, way in ways.items()]


def main() -> None:
    """Trains the variants that the file of results lacks, then prints the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file of results, a JSON record a line; added to")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="replace a setting, in all variants"
    )
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    asked = {"steps": options.steps, "set": options.set}
    before = read(options.out)
    for seed in options.seeds:
        for variant in options.variants:
            key = {"variant": variant, "seed": seed, **asked}
            if options.table or any(record["run"] == key for record in before):
                continue
            found = records(variant, recipe_of(variant, seed, options.steps, options.set))
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run": key, "rows": found}) + "\n")
            for record in found:
                print(f"seed {seed}, {record['row']}: {record['mean_iou']:.1f}", flush=True)
    wanted = [r for r in read(options.out) if all(r["run"][name] == value for name, value in asked.items())]
    print("\n".join(table(row for record in wanted for row in record["rows"])))


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file, one a run; removes a line that a killed process left unfinished."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def table(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """Markdown: of each row the mean over seeds, with the lowest and the highest."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for record in found:
        rows.setdefault(record["row"], []).append(record)
    lines = ["| | mean IoU | oracle IoU | mask Jaccard | seeds |", "|---|---|---|---|---|"]
    measures = ("mean_iou", "oracle_mean_iou", "mask_jaccard")
    for row, name in ROWS.items():
        if row in rows:
            cells = [_spread([record[key] for record in rows[row]]) for key in measures]
            lines.append(f"| {name} | {' | '.join(cells)} | {len(rows[row])} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    sys.exit(terminal.run(main))
