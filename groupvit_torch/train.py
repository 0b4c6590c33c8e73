"""The training loop: a recipe -> captioned images -> checkpoints, on one device or as many as `torchrun` starts.

    groupvit train scenes-demo --out DIR
    torchrun --nproc-per-node 8 -m groupvit_common.cli train gcc-yfcc-30e --out DIR --resume auto

Everything is drawn from the recipe's seed. A step is one update of the weights by the global batch, however many
devices and chunks it is divided among.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from groupvit_common.training.checkpoints import find, restoring
from groupvit_common.training.grouping_health import IMAGES_WATCHED, watch_grouping
from groupvit_common.training.initial_model import MULTI_LABEL_SCALE
from groupvit_common.training.log import RunLog
from groupvit_common.training.recipe import Recipe
from groupvit_common.training.run import Run, TrainResult
from groupvit_common.training.schedule import assigns_hard, ema_decay_at, learning_rate_at
from groupvit_common.training.settings import changed
from groupvit_common.training.start import start_run
from groupvit_common.training.validation import Evaluate
from groupvit_torch.chunks import cached_backward
from groupvit_torch.data import Feed, Inputs
from groupvit_torch.distributed import ProcessInfo, process_group
from groupvit_torch.model import GroupViTModel
from groupvit_torch.objective import Objective, new_model, start_model
from groupvit_torch.optimizer import EMA, make_optimizer, set_learning_rate
from groupvit_torch.train_state import TrainState

__all__ = [
    "Objective", "StepResult", "cached_backward", "make_optimizer", "new_model", "peak_flops", "start_model",
    "step_flops", "train", "train_step",
]  # fmt: skip

# Dense bfloat16 and float16 operations a second by the makers' data sheets.
_PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121,
    "A10": 125,
}  # fmt: skip


def train(
    recipe: Recipe | str,
    out_dir: str | Path,
    *,
    seed: int | None = None,
    resume: str | Path = "never",
    device: str | torch.device | None = None,
    evaluate: Evaluate | None = None,
    log: Callable[[str], None] = print,
) -> TrainResult:
    """Trains a model and writes it to `out_dir`: a model directory, `training.json`, `metrics.jsonl`, `checkpoints/`.

    Args:
        recipe: settings, or what `groupvit_common.training.recipe.get_recipe` takes: a name or a TOML file.
        seed: replaces the recipe's.
        resume: "never"; "auto": from the newest valid checkpoint in `out_dir` if there is one; or a checkpoint's path.
        device: None: this process's GPU if there is one, else the CPU.
        evaluate: measures a `Segmenter` of the model now and then; the validation scenes are measured anyway in a run
            on scenes.
        log: receives one line at a time, on the first process.

    Raises:
        InputError: an unknown name, a directory that cannot be made, an unavailable device, an unfinished run in
            `out_dir`.
        CheckpointError: a checkpoint that cannot be resumed or started from, or no room for the last one.
        Interrupted: SIGTERM or Ctrl-C; the state of the run is saved.
        GroupViTError: losses or gradients are no longer finite.
    """
    with process_group(device) as process:
        # One process decides: others might not see yet what it sees.
        found = find(Path(out_dir), resume, log=log) if process.rank == 0 else None
        resume = process.all(found)[0] or resume
        run = start_run(
            recipe,
            out_dir,
            seed=seed,
            log=log,
            backend=f"PyTorch {torch.__version__}",
            threads=torch.get_num_threads(),
            rank=process.rank,
            world=process.world,
            resume=resume,
            evaluate=evaluate,
        )
        try:
            return _Loop(run, process).go()
        finally:
            run.close()


# A step


class StepResult(NamedTuple):
    """The result of a step.

    loss: the mean over ranks; norm: of the gradient before it is clipped; taken: whether the weights were changed;
    overflowed: float16 could not hold the gradient at its present scale, which is no fault of the batch; assignments:
    soft, of images.
    """

    loss: float
    norm: float
    taken: bool
    overflowed: bool
    assignments: tuple[Tensor, ...]


def train_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    *,
    hard: bool,
    process: ProcessInfo | None = None,
    wrapped: nn.Module | None = None,
    scaler: torch.amp.GradScaler | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> StepResult:
    """Takes one step, or skips it if the loss or gradient is not finite: then not even batch norm's statistics change.

    Args:
        process: this one; None: there are no others.
        wrapped: `objective` in data-parallel training.
        scaler: of float16's loss.
        meanwhile: called while a GPU computes.
    """
    objective.train()
    scaler = torch.amp.GradScaler(enabled=False) if scaler is None else scaler
    statistics = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    optimizer.zero_grad()
    chunk = objective.recipe.run.chunk_size
    if 0 < chunk < len(inputs.pixels):
        loss, assignments = cached_backward(objective, inputs, chunk, hard, wrapped, scaler)
    else:
        loss, assignments = (wrapped or objective)(inputs, hard)
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    limit = objective.recipe.optimizer.clip_norm or math.inf
    norm = nn.utils.clip_grad_norm_([p for p in objective.parameters() if p.requires_grad], limit)
    meanwhile()
    wide = torch.promote_types(loss.dtype, torch.float32)
    loss_value, norm_value = torch.stack([loss.detach().to(wide), norm.to(wide)]).tolist()
    if process is not None:
        (loss_value,) = process.mean([loss_value])
    taken = math.isfinite(loss_value) and math.isfinite(norm_value)
    overflowed = not taken and math.isfinite(loss_value) and scaler.is_enabled() and scaler.get_scale() > 1.0
    if taken:
        scaler.step(optimizer)
        objective.limit_scales()
    else:
        with torch.no_grad():
            for buffer, before in statistics:
                buffer.copy_(before)
    scaler.update()
    return StepResult(loss_value, norm_value, taken, overflowed, tuple(a.detach() for a in assignments))


def step_flops(objective: Objective, inputs: Inputs) -> float:
    """Counts the floating-point operations of the towers, forward and backward, for these inputs, on shapes alone.

    The projections and losses add less than a hundredth at the paper's sizes. What gradient checkpointing and cached
    features compute twice counts once: it is the work that has to be done.
    """
    with _uncompiled(objective.model):
        twin = copy.deepcopy(objective).to("meta").train()
    twin.recipe = changed(twin.recipe, {"run.precision": "float32"})  # autocast knows no such device
    twin.model.gradient_checkpointing_disable()
    with FlopCounterMode(display=False) as counter:
        features = [twin.encode(kind, rows, hard=False)[0] for kind, rows in twin.rows(inputs.to("meta")).items()]
        parts = [feature.float().sum() for own in features for feature in own.values() if feature.requires_grad]
        torch.stack(parts).sum().backward()
    return float(counter.get_total_flops())


def peak_flops(recipe: Recipe, device: torch.device) -> float:
    """Returns the operations a second of one device: the recipe's, else the known ones; 0 for others."""
    if recipe.run.peak_tflops:
        return recipe.run.peak_tflops * 1e12
    if device.type != "cuda" or recipe.run.precision == "float32":
        return 0.0
    called = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
    return next((peak * 1e12 for name, peak in _PEAK_TFLOPS.items() if f" {name} " in called), 0.0)


# A run


class _Loop:
    """One process of a run, from the first step to the last."""

    def __init__(self, run: Run, process: ProcessInfo) -> None:
        self.run, self.process, recipe = run, process, run.recipe
        self.first = process.rank == 0
        torch.manual_seed(recipe.run.seed)
        model, scale = start_model(recipe, run.processor)
        self.objective = Objective(model, recipe, scale).to(process.device)
        has_ema = recipe.optimizer.ema_decay and run.measures_here
        self.ema = EMA(self.objective, partial(ema_decay_at, recipe)) if has_ema else None
        self.optimizer = make_optimizer(self.objective)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=recipe.run.precision == "float16")
        self.state = TrainState(self.objective, self.optimizer, self.scaler, self.ema)
        if process.rank:
            # Each rank draws its own noise.
            seeds = np.random.SeedSequence([recipe.run.seed, process.rank]).generate_state(1)
            torch.manual_seed(int(seeds[0]))
        if run.resumed is not None:
            assert run.resumed_from is not None
            with restoring(run.resumed_from):
                ranks = run.resumed.values["ranks"]
                own = ranks[run.rank] if len(ranks) == run.world else {}
                self.state.restore(run.resumed, run.resumed_from, own)
        elif self.first:
            run.measure_untrained(self.state.segmenter(run.processor), model.num_parameters())
        if recipe.run.compile:
            tower = cast(Any, model.vision_model)
            tower.run_stages = torch.compile(tower.run_stages)
            cast(Any, model.text_model).forward = torch.compile(model.text_model.forward)
        self.wrapped: nn.Module | None = None
        if process.world > 1:
            devices = [process.device] if process.device.type == "cuda" else None
            # Batch norms see all ranks' images: their statistics are alike. PyTorch 2.13 renamed the option.
            new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            unsynchronised: Any = {"forward_sync_buffers" if new else "broadcast_buffers": False}
            self.wrapped = DistributedDataParallel(self.objective, device_ids=devices, **unsynchronised)
        self.log = RunLog(recipe, run.directory, step=run.step, log=run.log) if self.first else None
        self.feed = Feed(run.stream(), partial(Inputs.of, device=process.device))
        self.saved = time.monotonic()
        self.recent: list[float] = []
        self.peak, self.flops = peak_flops(recipe, process.device) * process.world, 0.0

    def go(self) -> TrainResult:
        run = self.run
        try:
            with run.signal_handlers():
                while not run.finished:
                    self._step()
                    if run.evaluates_now():
                        self._measure()
                    stop, late = self._agree(run.stop_signal, (time.monotonic() - self.saved) / 60)
                    saves = run.saves_now(late)
                    saved = self._save() if saves or stop else False
                    if stop and not run.finished:
                        raise run.interrupted(stop, saved)
        finally:
            self.feed.close()
            if self.log is not None:
                self.log.close()
        return run.result()

    def _step(self) -> None:
        run, recipe = self.run, self.run.recipe
        inputs = self.feed.take()
        rate = learning_rate_at(recipe, run.step)
        set_learning_rate(self.optimizer, rate)
        ahead = run.step + 1 < recipe.schedule.total_steps and self.process.device.type == "cuda"
        result = train_step(
            self.objective,
            self.optimizer,
            inputs,
            hard=assigns_hard(recipe, run.step),
            process=self.process,
            wrapped=self.wrapped,
            scaler=self.scaler,
            meanwhile=self.feed.look_ahead if ahead else lambda: None,
        )
        if result.taken:
            if self.ema is not None:
                self.ema.update(run.step)
            self.recent.append(result.loss)
        if result.taken or result.overflowed:
            run.record_step(result.loss)
        else:
            run.record_skipped_step(result.loss, result.norm, inputs.arrays())
        if run.step % recipe.run.log_every == 0 or run.finished:
            self._report(inputs, result, rate)

    def _report(self, inputs: Inputs, result: StepResult, rate: float) -> None:
        if self.log is None:
            return
        if self.peak and not self.flops:
            self.flops = step_flops(self.objective, inputs) * self.process.world
        values = {
            "loss": float(np.mean(self.recent)) if self.recent else math.nan,
            "learning_rate": rate,
            "gradient_norm": result.norm,
            "logit_scale": float(self.objective.model.logit_scale.detach().exp()),
            "bad_steps": self.run.bad_steps,
        }
        if self.objective.multi_label_logit_scale is not None:
            values[MULTI_LABEL_SCALE] = float(self.objective.multi_label_logit_scale.detach().exp())
        if self.scaler.is_enabled():
            values["gradient_scale"] = self.scaler.get_scale()
        measures, warnings = watch_grouping(a[:IMAGES_WATCHED].float().cpu().numpy() for a in result.assignments)
        self.log.progress(self.run.step, values | measures, flops=self.flops, peak=self.peak)
        for warning in warnings:
            self.run.log(f"step {self.run.step}: {warning}")
        self.recent.clear()

    def _measure(self) -> None:
        if not self.run.measures_here:
            return
        with _uncompiled(self.state.best().model):
            self.run.measure_and_save(
                self.state.save_pretrained, self.state.segmenter(self.run.processor), self.process
            )
        if self.log is not None:
            self.log.record(self.run.step, self.run.validation.latest())
            self.log.start(self.run.step)

    def _agree(self, stop: int, minutes: float) -> tuple[int, float]:
        """Returns any rank's signal, and the first one's minutes since the last checkpoint: alike on all."""
        if self.process.world == 1:
            return stop, minutes
        answers = self.process.mean([float(bool(stop)), minutes if self.first else 0.0])
        return (stop or 15) if answers[0] else 0, answers[1] * self.process.world

    def _save(self) -> bool:
        ranks = self.process.all({"data": self.feed.state_dict(), **self.state.random_state()})
        saved = self.process.all(self._write(ranks) if self.first else False)[0]
        self.saved = time.monotonic()
        return saved

    def _write(self, ranks: Sequence[Mapping[str, Any]]) -> bool:
        saved = self.run.save_checkpoint(self.state.save_pretrained, *self.state.state(), ranks)
        if self.log is not None:
            self.log.start(self.run.step)
        return saved


@contextmanager
def _uncompiled(model: GroupViTModel) -> Iterator[None]:
    """Without `torch.compile` within: images to be measured come in other sizes and numbers than those of training."""
    parts: list[tuple[Any, str]] = [(model.vision_model, "run_stages"), (model.text_model, "forward")]
    taken = [(part, name, part.__dict__.pop(name)) for part, name in parts if name in part.__dict__]
    try:
        yield
    finally:
        for part, name, compiled in taken:
            setattr(part, name, compiled)
