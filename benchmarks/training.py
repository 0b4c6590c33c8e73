"""Images per second and memory of a training step, and the cost of a whole run.

    python -m benchmarks.training --batch 256 1024 4096 --compile no yes --chunk 0 512
    python -m benchmarks.training --transformers                    # the same loop around transformers' model too
    python -m benchmarks.training --count --batch 256 1024          # memory on shapes alone, for any machine
    python -m benchmarks.training --plan --days 2 5 --price 2.50    # nothing is run: operations are counted on shapes

Every case is a process of its own, on images and texts made in memory, without a data pipeline
(`benchmarks.data_pipeline` measures that). Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from groupvit_common.cli import terminal
from groupvit_common.cli.parser import Parser
from groupvit_common.data.captions.stream import CaptionBatch
from groupvit_common.errors import InputError
from groupvit_common.segmentation.scores import MAX_LOGIT_SCALE
from groupvit_common.training.initial_model import model_config
from groupvit_common.training.recipe import Recipe, get_recipe
from groupvit_common.training.settings import changed
from groupvit_torch.attention import forced
from groupvit_torch.data import Inputs
from groupvit_torch.loss import contrastive_loss, multi_label_contrastive_loss
from groupvit_torch.model import GroupViTModel
from groupvit_torch.train import Objective, cached_backward, make_optimizer, peak_flops, step_flops, train_step

VOCABULARY = 49408  # CLIP's
UTILISATIONS = (0.1, 0.2, 0.3, 0.4, 0.5)
_NO_MEMORY = "out of memory"
_KILLED = (-9, 137)  # as the kernel ends a process that needs more memory than there is


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement. tokens: of the longest text; transformers: that library's model in the place of ours."""

    recipe: str
    changes: tuple[str, ...]
    batch: int
    precision: str
    compiled: bool
    checkpointing: bool
    chunk: int
    transformers: bool
    tokens: int
    warmup: int
    steps: int
    device: str
    peak: float
    limit: float


def recipe_of(case: Case) -> Recipe:
    settings = {
        "run.precision": case.precision,
        "run.gradient_checkpointing": case.checkpointing,
        "run.chunk_size": case.chunk,
        "run.peak_tflops": case.peak,
        "schedule.batch_size": case.batch,
    }
    return changed(get_recipe(case.recipe, case.changes), settings)


def made_batch(recipe: Recipe, batch: int, tokens: int, seed: int = 0) -> Inputs:
    """Returns random images; captions and prompts of 8 to 25 tokens, but one of them of `tokens`, to which all are
    padded.

    A batch of thousands of captions from the web has one as long as the model takes.
    """
    rng = np.random.default_rng(seed)
    if recipe.objective.kind != "paper":
        raise InputError(f"the step of the paper's objective is measured, got a recipe of {recipe.objective.kind!r}")
    each = (recipe.scenes if recipe.data is None else recipe.data).prompts
    side, length = recipe.model.image_size, recipe.model.text_length
    lengths = rng.integers(8, 26, (batch, 1 + each, 1)).clip(max=tokens)
    lengths[0] = tokens
    place = np.arange(length)
    ids = np.where(place < lengths - 1, rng.integers(0, VOCABULARY - 2, (batch, 1 + each, length)), VOCABULARY - 1)
    mask = (place < lengths).astype(np.int64)
    pixels = rng.standard_normal((batch, 3, side, side), np.float32)
    prompts = (ids[:, 1:], mask[:, 1:]) if recipe.multi_label else (None, None)
    return Inputs.of(CaptionBatch(pixels, ids[:, 0], mask[:, 0], *prompts, keys=[""] * batch))


def new_module(recipe: Recipe) -> Objective:
    return Objective(GroupViTModel(model_config(recipe, VOCABULARY)), recipe)


class TransformersModule(nn.Module):
    """transformers' model with the losses of ours, as `train_step` takes it. It drops no paths."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        from transformers import GroupViTConfig
        from transformers import GroupViTModel as Theirs

        self.recipe = recipe
        self.model: Any = Theirs(GroupViTConfig.from_dict(model_config(recipe, VOCABULARY).to_dict()))
        self.multi_label_logit_scale = nn.Parameter(self.model.logit_scale.detach().clone())
        if recipe.run.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()

    def named_trainable(self) -> dict[str, nn.Parameter]:
        return {name.removeprefix("model."): parameter for name, parameter in self.named_parameters()}

    def forward(self, inputs: Inputs, hard: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        precision = self.recipe.run.precision
        half = precision != "float32"
        with torch.autocast(inputs.pixels.device.type, getattr(torch, precision) if half else None, enabled=half):
            images = self.model.visual_projection(self.model.vision_model(inputs.pixels).pooler_output)
            both = [tokens for tokens in (inputs.captions, inputs.prompts) if tokens is not None]
            texts = self.model.text_projection(torch.cat([self.model.text_model(**t).pooler_output for t in both]))
        images, texts = images.float(), texts.float()
        loss = contrastive_loss(images, texts[: len(images)], self.model.logit_scale.exp())
        if inputs.of_caption is not None:
            own = texts[len(images) :][inputs.of_caption]
            scale = self.multi_label_logit_scale.exp()
            weight = self.recipe.objective.multi_label_weight
            loss = loss + weight * multi_label_contrastive_loss(images, own, scale)
        return loss, ()

    def limit_scales(self) -> None:
        with torch.no_grad():
            for scale in (self.model.logit_scale, self.multi_label_logit_scale):
                scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


def measure(case: Case) -> dict[str, float]:
    """Measures a case in this process: seconds and CPU seconds a step, peak memory in GiB, fraction of the device's
    peak.

    Memory is the device's, on a CPU that of the whole process.
    """
    if case.limit:
        resource.setrlimit(resource.RLIMIT_AS, (int(case.limit * 2**30),) * 2)
    torch.manual_seed(0)
    recipe, device = recipe_of(case), torch.device(case.device)
    module = cast(Objective, TransformersModule(recipe)) if case.transformers else new_module(recipe)
    module = module.to(device)
    optimizer = make_optimizer(module)
    inputs = made_batch(recipe, case.batch, case.tokens).to(device)
    peak = peak_flops(recipe, device)
    # Of our model whichever is measured: the work that has to be done is the same.
    flops = step_flops(new_module(recipe), inputs.to("cpu")) if peak else 0.0
    if case.compiled:
        # As the training loop does.
        tower: Any = module.model.vision_model
        if case.transformers:
            tower.forward = torch.compile(tower.forward)
        else:
            tower.run_stages = torch.compile(tower.run_stages)
        text: Any = module.model.text_model
        text.forward = torch.compile(text.forward)
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "float16")
    on_gpu = device.type == "cuda"
    seconds, cpu = [], []
    for number in range(case.warmup + case.steps):
        if on_gpu and number == case.warmup:
            torch.cuda.reset_peak_memory_stats(device)
        start, cpu_start = time.perf_counter(), time.process_time()
        # It reads the loss: what was queued on a device is done by then, but for the update.
        result = train_step(module, optimizer, inputs, hard=True, scaler=scaler)
        if on_gpu:
            torch.cuda.synchronize(device)
        if number >= case.warmup:
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
    assert math.isfinite(result.loss)
    middle = statistics.median(seconds)
    memory = (
        torch.cuda.max_memory_allocated(device) / 2**30
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    share = flops / middle / peak if peak else math.nan
    return {"seconds": middle, "cpu": statistics.median(cpu), "memory": memory, "share": share}


# Memory on shapes alone


class Held(TorchDispatchMode):
    """Counts the bytes of all (fake) tensors that are made within: `bytes` now, `peak` at their most.

    Without what a device's allocator adds and its kernels use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def hold(self, tensor: Tensor) -> None:
        """Counts a tensor's memory until nothing has it any more; views share theirs."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        size = storage.nbytes()
        self.known.add(storage._cdata)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.hold, result)
        return result


def count(case: Case) -> dict[str, float]:
    """Counts the peak memory of a step on a GPU in GiB, on shapes alone: weights, gradients, the optimizer's two
    moments, and all tensors of the forward and backward pass."""
    recipe, shapes = recipe_of(case), made_batch(recipe_of(case), 4, case.tokens)
    module = new_module(recipe).to("meta")
    # Fake tensors of a GPU would need a PyTorch with CUDA. Those of a CPU do, with attention that is fused as on a GPU.
    # On a CPU the model checks the ids, which fake ones do not have.
    with (
        FakeTensorMode(),
        forced("fused"),
        mock.patch("groupvit_torch.text.check_ids"),
    ):

        def fake(tensor: Tensor, rows: int | None = None) -> Tensor:
            shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
            return torch.empty(shape, dtype=tensor.dtype)

        module = module._apply(fake).train()

        def whole(value: Any) -> Any:
            value = dict(value) if isinstance(value, Mapping) else value
            return tree_map_only(Tensor, lambda tensor: fake(tensor, len(tensor) // 4 * case.batch), value)

        inputs = Inputs(**{field.name: whole(getattr(shapes, field.name)) for field in fields(shapes)})
        held = Held()
        tree_map_only(Tensor, held.hold, [*module.parameters(), *module.buffers(), vars(inputs)])
        held.bytes += 2 * sum(p.nbytes for p in module.parameters() if p.requires_grad)
        with held:
            if 0 < case.chunk < case.batch:
                cached_backward(module, inputs, case.chunk, hard=True)
            else:
                loss, _ = module(inputs, True)
                loss.backward()
    return {"memory": held.peak / 2**30, **dict.fromkeys(("seconds", "cpu", "share"), math.nan)}


def in_a_process(case: Case) -> dict[str, Any]:
    """Measures a case in a process of its own; {"failed": why} if that fails, as without enough memory."""
    command = [sys.executable, "-m", "benchmarks.training", "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    if done.returncode in _KILLED or _is_about_memory(done.stderr):
        return {"failed": _NO_MEMORY}
    lines = done.stderr.strip().splitlines()
    return {"failed": lines[-1] if lines else f"exit status {done.returncode}"}


def _is_about_memory(errors: str) -> bool:
    words = ("out of memory", "OutOfMemoryError", "MemoryError", "not enough memory", "can't allocate memory")
    return any(word in errors for word in words)


# A plan


def images_of(recipe: Recipe) -> int:
    """Returns the number of images of a whole run."""
    return recipe.schedule.total_steps * recipe.schedule.batch_size


def flops_per_image(recipe: Recipe, tokens: int, batch: int = 4) -> float:
    """Counts the operations of a training step for one image and its texts, on shapes."""
    plain = changed(recipe, {"run.chunk_size": 0})
    return step_flops(new_module(plain), made_batch(plain, batch, tokens)) / batch


def gpu_hours(images: float, flops: float, peak: float, utilisation: float) -> float:
    """Returns the hours of one device at this fraction of its peak, in operations a second."""
    return images * flops / (peak * utilisation) / 3600


def plan(
    recipe: Recipe, *, tokens: int, gpus: int, peak: float, days: Sequence[float], price: float, per_core: float
) -> list[str]:
    """Returns the lines of a plan.

    Args:
        peak: TFLOP/s of one device.
        price: of one device's hour; 0: unknown.
        per_core: images/s of the data pipeline on a CPU core.
    """
    images, flops = images_of(recipe), flops_per_image(recipe, tokens)
    schedule = recipe.schedule
    lines = [
        f"{images / 1e6:.1f} million images ({schedule.total_steps} steps of {schedule.batch_size}), "
        f"{flops / 1e9:.1f} GFLOP each (forward and backward, texts of {tokens} tokens): {images * flops:.2e} in all",
        "",
        f"| utilisation of {gpus} x {peak:g} TFLOP/s | images/s | cores for data | hours | GPU-hours |"
        + (" cost |" if price else ""),
        "|---|---|---|---|---|" + ("---|" if price else ""),
    ]
    for utilisation in UTILISATIONS:
        hours = gpu_hours(images, flops, peak * 1e12, utilisation)
        speed = images / (hours / gpus) / 3600
        row = f"| {utilisation:.0%} | {speed:.0f} | {speed / per_core:.0f} | {hours / gpus:.1f} | {hours:.0f} |"
        lines.append(row + (f" {hours * price:.0f} |" if price else ""))
    head = "| days | images/s needed | of each GPU | cores for data | utilisation needed |"
    lines += ["", head, "|---|---|---|---|---|"]
    for count in days:
        speed = images / (count * 86400)
        share = speed * flops / (gpus * peak * 1e12)
        lines.append(f"| {count:g} | {speed:.0f} | {speed / gpus:.0f} | {speed / per_core:.0f} | {share:.1%} |")
    return lines


# The command


def _number(kind: Callable[[str], float], least: float) -> Callable[[str], Any]:
    """A type for argparse: a number above `least`."""

    def read(text: str) -> float:
        value = kind(text)
        if not least < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be a number above {least:g}, got {text}")
        return value

    return read


_whole, _positive = _number(int, 0), _number(float, 0.0)


def main() -> None:
    """Prints a table in Markdown."""
    parser = Parser(description=__doc__)
    parser.add_argument("--recipe", default="gcc-yfcc-30e", help="a named run or a TOML file (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="replace a setting")
    parser.add_argument("--batch", type=_whole, nargs="+", default=[256], help="batch sizes (default: 256)")
    parser.add_argument("--precision", nargs="+", default=["bfloat16"], help="bfloat16, float32, float16")
    switch = {"nargs": "+", "choices": ("no", "yes"), "default": ["no"]}
    parser.add_argument("--compile", **switch, help="torch.compile (default: no)")
    parser.add_argument("--checkpointing", **switch, help="gradient checkpointing (default: no)")
    parser.add_argument("--chunk", type=int, nargs="+", default=[0], help="run.chunk_size (default: 0, all at once)")
    parser.add_argument("--transformers", action="store_true", help="transformers' model too, where it is not chunked")
    parser.add_argument("--tokens", type=_whole, help="of the longest text (default: as long as the model takes)")
    parser.add_argument(
        "--warmup", type=_number(int, -1), default=3, help="steps before those that are timed (default: %(default)s)"
    )
    parser.add_argument("--steps", type=_whole, default=10, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=0.0, metavar="GIB", help="of a process's address space (CPU)")
    parser.add_argument(
        "--peak", type=_positive, default=0.0, metavar="TFLOPS", help="of the device, where it is not known"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--count", action="store_true", help="only memory, counted on shapes: weights, gradients, moments, activations"
    )
    only.add_argument("--plan", action="store_true", help="the cost of the recipe's whole run; runs nothing")
    parser.add_argument("--gpus", type=_whole, default=8, help="of the plan (default: %(default)s)")
    parser.add_argument("--days", type=_positive, nargs="*", default=[1, 2, 4, 7], help="of the plan, wished for")
    parser.add_argument(
        "--per-core",
        type=_positive,
        default=260.0,
        help="images/s of the data pipeline on a core, for the plan (default: %(default)s, in docs/benchmarks.md)",
    )
    parser.add_argument("--price", type=float, default=0.0, help="of a GPU's hour, for the plan")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        values = json.loads(options.case)
        print(json.dumps(measure(Case(**{**values, "changes": tuple(values["changes"])}))))
        return
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: PyTorch finds no GPU here")
    try:
        _print(parser, options)
    except InputError as error:
        parser.error(str(error))


def _print(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    recipe = get_recipe(options.recipe, options.set)
    options.tokens = min(options.tokens or recipe.model.text_length, recipe.model.text_length)
    if options.plan:
        peak = options.peak or 989.0  # an H100's in bfloat16, dense, by the maker's data sheet
        lines = plan(
            recipe,
            tokens=options.tokens,
            gpus=options.gpus,
            peak=peak,
            days=options.days,
            price=options.price,
            per_core=options.per_core,
        )
        print("\n".join(lines))
        return
    if options.count and ("yes" in options.compile or options.transformers):
        parser.error("--count knows our model as it is: neither --compile yes nor --transformers")
    name = "counted on shapes" if options.count else f"{torch.get_num_threads()} threads"
    if options.device.startswith("cuda") and not options.count:
        name = torch.cuda.get_device_name()
    print(
        f"{options.recipe}, PyTorch {torch.__version__}, {options.device} ({name}), texts of {options.tokens} tokens\n"
    )
    print(
        "| model | batch | precision | compiled | checkpointing | chunk "
        "| images/s | CPU s an image | peak GiB | of peak |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    every = list(cases(options))
    for case in every:
        recipe_of(case)  # settings that cannot be are refused before anything runs
    for case in every:
        print(row(case, count(case) if options.count else in_a_process(case)), flush=True)


def cases(options: argparse.Namespace) -> Iterable[Case]:
    """Returns every combination of the options."""
    yes: Callable[[str], bool] = "yes".__eq__
    models = (False, True) if options.transformers else (False,)
    ways = itertools.product(
        models, options.batch, options.precision, options.compile, options.checkpointing, options.chunk
    )
    for transformers, batch, precision, compiled, checkpointing, chunk in ways:
        if not (transformers and chunk):
            yield Case(
                recipe=options.recipe,
                changes=tuple(options.set),
                batch=batch,
                precision=precision,
                compiled=yes(compiled),
                checkpointing=yes(checkpointing),
                chunk=chunk,
                transformers=transformers,
                tokens=options.tokens,
                warmup=options.warmup,
                steps=options.steps,
                device=options.device,
                peak=options.peak,
                limit=options.limit,
            )


def row(case: Case, found: dict[str, Any]) -> str:
    """Returns a line of the table."""
    model = "transformers" if case.transformers else "groupvit"
    words = [
        model,
        str(case.batch),
        case.precision,
        *("yes" if on else "" for on in (case.compiled, case.checkpointing)),
    ]
    words.append(str(case.chunk or ""))
    if "failed" in found:
        words += [found["failed"], "", "", ""]
    else:

        def known(value: float, form: str) -> str:
            return "" if math.isnan(value) else format(value, form)

        words += [
            known(case.batch / found["seconds"], ".3g"),
            known(found["cpu"] / case.batch, ".2g"),
            known(found["memory"], ".2f"),
            known(found["share"], ".0%"),
        ]
    return f"| {' | '.join(words)} |"


if __name__ == "__main__":
    sys.exit(terminal.run(main))
