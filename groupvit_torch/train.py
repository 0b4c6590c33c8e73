"""The training loop: a recipe -> captioned pictures -> checkpoints, on one device or as many as `torchrun` starts.

    groupvit train scenes-demo --out DIR
    torchrun --nproc-per-node 8 -m groupvit_common.cli train gcc-yfcc-30e --out DIR --resume auto

Everything is drawn from the recipe's seed. A step is one update of the weights by the whole batch, however many devices and chunks it
is divided among: towers see images and texts one by one, and all that compares them (batch norm of the projections, losses)
sees the features of the whole batch.
"""

from __future__ import annotations

import base64
import copy
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from groupvit_common.checkpoints.directory import find_weights
from groupvit_common.checkpoints.safetensors_file import read_arrays
from groupvit_common.errors import CheckpointError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.segmentation.scores import MAX_LOGIT_SCALE
from groupvit_common.training.checkpoints import MODEL, find, restoring
from groupvit_common.training.grouping_health import watch_grouping
from groupvit_common.training.initial_model import (
    MULTI_LABEL_SCALE,
    model_config,
    multi_label_scale,
    segmentation_assignment,
    trainable_names,
    wave_positions,
)
from groupvit_common.training.log import RunLog
from groupvit_common.training.recipe import Recipe
from groupvit_common.training.run import Feed, Run, TrainResult
from groupvit_common.training.schedule import (
    assigns_hard,
    drop_path_rates,
    ema_decay_at,
    has_weight_decay,
    learning_rate_at,
)
from groupvit_common.training.settings import changed
from groupvit_common.training.start import start_run
from groupvit_common.training.validation import Evaluate
from groupvit_torch.chunks import Features, carried_back, encoded, random_state, set_random_state
from groupvit_torch.data import Inputs, Tokens
from groupvit_torch.distributed import Place, gather, num_replicas, process_group, project, replica_sum
from groupvit_torch.layers import EncoderLayer
from groupvit_torch.loss import (
    contrastive_loss,
    group_prompt_logits,
    multi_label_contrastive_loss,
    patch_naming,
    patch_naming_loss,
    prompt_claim_loss,
)
from groupvit_torch.model import GroupViTModel
from groupvit_torch.predictor import Segmenter

# Dense bfloat16 and float16 operations a second by the makers' data sheets.
_PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125,
}  # fmt: skip
_IMAGES_WATCHED = 32  # of whose grouping is measured


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
    """Trains a model and writes it to `out_dir`: weights, configuration, tokenizer, processor, `training.json`, `checkpoints/`.

    Args:
        recipe: settings, or what `groupvit_common.training.recipe.get_recipe` takes: a name or a TOML file.
        seed: replaces the recipe's.
        resume: "never"; "auto": from the newest valid checkpoint in `out_dir` if there is one; or a checkpoint's path.
        device: None: this process's GPU if there is one, else the CPU.
        evaluate: measures a `Segmenter` of the model now and then; held-out scenes are measured anyway in a run on scenes.
        log: receives one line at a time, on the first process.

    Raises:
        InputError: an unknown name, a directory that cannot be made, a device that is not there, an unfinished run in `out_dir`.
        CheckpointError: a checkpoint that cannot be continued or started from, or no room for the last one.
        Interrupted: SIGTERM or Ctrl-C; where the run stands is saved.
        GroupViTError: losses or gradients stopped being numbers.
    """
    with process_group(device) as place:
        version = f"PyTorch {torch.__version__}"
        # One process decides: others might not see yet what it sees.
        found = find(Path(out_dir), resume, log=log) if place.rank == 0 else None
        resume = place.all(found)[0] or resume
        run = start_run(
            recipe,
            out_dir,
            seed=seed,
            log=log,
            backend=version,
            threads=torch.get_num_threads(),
            rank=place.rank,
            world=place.world,
            resume=resume,
            evaluate=evaluate,
        )
        try:
            return _Loop(run, place).go()
        finally:
            run.close()


# The model and what it learns


def new_model(recipe: Recipe, processor: GroupViTProcessor) -> GroupViTModel:
    """The untrained model of a recipe, drawn from PyTorch's generator."""
    model = GroupViTModel(model_config(recipe, len(processor.tokenizer)))
    settings = recipe.model
    if settings.position_amplitude:
        waves = wave_positions(settings.image_size // settings.patch_size, settings.width, settings.position_amplitude)
        with torch.no_grad():
            model.vision_model.embeddings.position_embeddings.copy_(torch.from_numpy(waves))
    return model


def start_model(recipe: Recipe, processor: GroupViTProcessor) -> tuple[GroupViTModel, float | None]:
    """The model that a run starts with, and its multi-label temperature if it comes from a checkpoint that has one."""
    source = recipe.model.init_from
    if not source:
        return new_model(recipe, processor), None
    model = GroupViTModel.from_pretrained(source)
    model.config.update({"segmentation_assignment": segmentation_assignment(recipe)})
    return at_size(model, recipe.model.image_size), multi_label_scale(source)


@torch.no_grad()
def at_size(model: GroupViTModel, image_size: int) -> GroupViTModel:
    """The model for another image size, its position embeddings interpolated for good; itself where the size is its own."""
    settings = model.config.to_dict()
    if settings["vision_config"]["image_size"] == image_size:
        return model
    settings["vision_config"]["image_size"] = image_size
    resized = GroupViTModel(GroupViTConfig.from_dict(settings))
    state, side = model.state_dict(), image_size // model.config.vision_config.patch_size
    state["vision_model.embeddings.position_embeddings"] = model.vision_model.embeddings.positions(side, side)
    resized.load_state_dict(state)
    return resized.eval()


class Piece(NamedTuple):
    """Inputs of one tower that go through it together."""

    kind: Literal["image", "captions", "prompts"]
    inputs: Tensor | Tokens


class TrainingModule(nn.Module):
    """A model and a recipe's objective, in two halves: `encode` looks at images and texts one by one, `compare` at a whole batch.

    `forward` is what data-parallel training wraps.
    """

    def __init__(self, model: GroupViTModel, recipe: Recipe, multi_label_scale: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.multi_label_logit_scale: nn.Parameter | None = None
        if recipe.multi_label:
            start = float(model.logit_scale.detach()) if multi_label_scale is None else multi_label_scale
            self.multi_label_logit_scale = nn.Parameter(torch.tensor(start, device=model.device, dtype=model.dtype))
        layers = [layer for stage in model.vision_model.encoder.stages for layer in cast(Any, stage).layers]
        for layer, rate in zip(layers, drop_path_rates(recipe, len(layers)), strict=True):
            cast(EncoderLayer, layer).drop_path = rate
        if recipe.run.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        _freeze(self)

    def canonical(self) -> dict[str, Tensor]:
        """The tensors under the names of a checkpoint's files."""
        return {name.removeprefix("model."): tensor for name, tensor in self.state_dict().items()}

    def named_learnt(self) -> dict[str, nn.Parameter]:
        """The parameters that are learnt, by canonical name."""
        return {name.removeprefix("model."): p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> TrainingModule:
        """As ever, but a batch norm of which nothing is learnt keeps its statistics as they are."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def forward(
        self,
        inputs: Inputs | None,
        hard: bool,
        replay: tuple[Piece, Mapping[str, Tensor]] | None = None,
        touch: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a batch, and the soft assignments of its images.

        With `replay` instead: a piece that is encoded again, and the loss's gradients with respect to its features. What is returned then
        has the gradients of the loss that flow through this piece; with `touch`, and zeros for every parameter.
        """
        if replay is None:
            assert inputs is not None
            features, assignments = self.encode_all(self.pieces(inputs), hard)
            return self.compare(features, inputs), assignments
        piece, gradients = replay
        features, _ = self.encode(piece, hard)
        parts = [
            (features[name] * gradient).sum(dtype=torch.promote_types(gradient.dtype, torch.float32))
            for name, gradient in gradients.items()
            if features[name].requires_grad
        ]
        if touch:
            parts += [parameter.sum() * 0.0 for parameter in self.parameters() if parameter.requires_grad]
        return sum(parts, torch.zeros((), device=self.model.device)), ()

    def pieces(self, inputs: Inputs, chunk: int = 0) -> list[Piece]:
        """A batch cut into pieces of `chunk` images, or as many texts a piece as there are to so many images; 0: one of each kind."""
        chunk = chunk or len(inputs.pixels)
        pieces = [Piece("image", part) for part in inputs.pixels.split(chunk)]
        for kind in ("captions", "prompts"):
            tokens = getattr(inputs, kind)
            if tokens is not None and (kind == "captions" or self.recipe.needs_prompts):
                texts = len(tokens["input_ids"])
                size = texts if inputs.shared_prompts and kind == "prompts" else chunk * texts // len(inputs.pixels)
                cut = {name: tensor.split(max(size, 1)) for name, tensor in tokens.items()}
                pieces += [Piece(kind, dict(zip(cut, parts, strict=True))) for parts in zip(*cut.values(), strict=True)]
        return pieces

    def encode_all(self, pieces: Sequence[Piece], hard: bool) -> tuple[Features, tuple[Tensor, ...]]:
        """The features of several pieces, one after the other, and the soft assignments of the first one with images."""
        found: dict[str, list[Tensor]] = {}
        assignments: tuple[Tensor, ...] = ()
        for piece in pieces:
            features, seen = self.encode(piece, hard)
            assignments = assignments or seen
            for name, feature in features.items():
                found.setdefault(name, []).append(feature)
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}, assignments

    def encode(self, piece: Piece, hard: bool) -> tuple[Features, tuple[Tensor, ...]]:
        """What a tower makes of a piece, before the projections; and the soft assignments of images.

        Images: `images` `[B, D]`, or for the objective "groups": `groups` `[B, G, D]`, `assignment` `[B, G, P]`, `patches` `[B, P, D]`.
        Texts: `captions` or `prompts` `[N, D]`.
        """
        with self.computing():
            if piece.kind != "image":
                tokens = cast(Tokens, piece.inputs)
                return {piece.kind: self.model.text_model(**tokens).pooler_output}, ()
            tower = self.model.vision_model
            noise = None if self.recipe.objective.gumbel else _no_noise(self.model)
            _, stages = tower.run_stages(cast(Tensor, piece.inputs), gumbel_noise=noise, assign_hard=hard)
            groups = tower.layernorm(stages[-1].segments)
            assignments = tuple(stage.assignment for stage in stages if stage.assignment is not None)
            objective = self.recipe.objective
            features = {"images": groups.mean(dim=1)} if objective.has_paper_losses else {}
            if objective.kind == "paper":
                return features, assignments
            features |= {"groups": groups, "assignment": assignments[0]}
            if objective.ungrouped_weight:
                features["patches"] = tower.layernorm(stages[0].ungrouped)
            return features, assignments

    def compare(self, features: Features, inputs: Inputs) -> Tensor:
        """The recipe's loss of a batch from the features of all its pieces, over all ranks."""
        with self.computing():
            return (_paper_loss if self.recipe.objective.kind == "paper" else _groups_loss)(self, features, inputs)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The recipe's precision. A context of its own for each pass: autocast would reuse weights that it cast without gradients."""
        device, precision = self.model.device.type, self.recipe.run.precision
        if precision == "float32":
            yield
            return
        # What gradient checkpointing computes again, on the way back, is outside of this.
        plain = device == "cpu" and not self.recipe.run.gradient_checkpointing
        with _plain_attention(plain), torch.autocast(device, getattr(torch, precision)):
            yield

    @torch.no_grad()
    def limit_scales(self) -> None:
        """Neither temperature's factor may exceed 100, as in the authors' code. Called after each step."""
        for scale in (self.model.logit_scale, self.multi_label_logit_scale):
            if scale is not None:
                scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


def _no_noise(model: GroupViTModel) -> list[Tensor]:
    """Zeros for each grouping block: None would draw the paper's noise."""
    blocks = sum(count > 0 for count in model.config.vision_config.num_group_tokens)
    return [torch.zeros(1, 1, 1, device=model.device)] * blocks


def _freeze(module: TrainingModule) -> None:
    """Leaves out of training what the recipe says."""
    named = {name.removeprefix("model."): parameter for name, parameter in module.named_parameters()}
    wanted = trainable_names(named, module.recipe.model)
    for name, parameter in named.items():
        parameter.requires_grad_(name in wanted)


def _paper_loss(module: TrainingModule, features: Features, inputs: Inputs) -> Tensor:
    """The paper's two losses on the pooled image."""
    model = module.model
    images = project(model.visual_projection, features["images"])
    prompts: Tensor | None = None
    if inputs.shared_prompts and "prompts" in features:
        captions = project(model.text_projection, features["captions"])
        prompts = project(model.text_projection, features["prompts"], together=False)
    else:
        # Captions and prompts are one batch of texts, as in the authors' code.
        texts = [features[name] for name in ("captions", "prompts") if name in features]
        projected = project(model.text_projection, torch.cat(texts))
        captions, prompts = projected[: len(texts[0])], projected[len(texts[0]) :]
    return _contrast(module, images, captions, prompts, inputs, model.logit_scale)


def _contrast(
    module: TrainingModule,
    images: Tensor,
    captions: Tensor,
    prompts: Tensor | None,
    inputs: Inputs,
    log_scale: Tensor,
    first: int = 0,
) -> Tensor:
    """The two losses from embeddings `[B, E]` and prompts `[W, E]`, over all ranks, without the whole batch's `first` images."""
    with torch.autocast(images.device.type, enabled=False):
        images = gather(images)[first:]
        loss = contrastive_loss(images, gather(captions)[first:], log_scale.exp())
        if module.multi_label_logit_scale is not None:
            assert prompts is not None
            assert inputs.of_caption is not None
            own = gather(prompts[inputs.of_caption])[first:]  # [B, M, E]
            scale = module.multi_label_logit_scale.exp()
            loss = loss + module.recipe.objective.multi_label_weight * multi_label_contrastive_loss(images, own, scale)
    return loss


def _groups_loss(module: TrainingModule, features: Features, inputs: Inputs) -> Tensor:
    """Groups, and the patches before they are grouped, against the prompts of the batch (`groupvit_torch.loss`).

    The mean over ranks is the loss of the whole batch.
    """
    model, settings = module.model, module.recipe.objective
    assert inputs.named is not None
    assert inputs.allowed is not None
    named, allowed = inputs.named, inputs.allowed
    groups = features["groups"]
    groups = project(model.visual_projection, groups.flatten(0, 1)).unflatten(0, groups.shape[:2])
    prompts = project(model.text_projection, features["prompts"], together=False)
    whole = named.any(dim=1)  # mixed images have lost parts of their objects: nothing is claimed there
    claims = named[whole]
    # A claim counts as much on every rank, wherever there are more of them.
    wide = torch.promote_types(groups.dtype, torch.float32)
    share = 1.0 if num_replicas() == 1 else _share(claims.sum().to(wide))

    def loss(logits: Tensor, assignment: Tensor | None) -> Tensor:
        naming = patch_naming(logits, assignment)
        claim = prompt_claim_loss(naming[whole], claims, settings.claim_patches)
        return settings.naming_weight * patch_naming_loss(naming, allowed) + settings.claim_weight * share * claim

    patches = None
    if settings.ungrouped_weight:
        # Its batch norm keeps nothing but groups, which is all that it meets in use.
        patches = features["patches"]
        patches = project(model.visual_projection, patches.flatten(0, 1), keep=False).unflatten(0, patches.shape[:2])
    with torch.autocast(groups.device.type, enabled=False):
        scale = model.logit_scale.exp()
        total = loss(group_prompt_logits(groups, prompts, scale), features["assignment"])
        if patches is not None:
            total = total + settings.ungrouped_weight * loss(group_prompt_logits(patches, prompts, scale), None)
    if not settings.paper_weight:
        return total
    images = project(model.visual_projection, features["images"], keep=False)
    captions = project(model.text_projection, features["captions"], keep=False)
    # A temperature of their own, since the model's is that of groups.
    own_scale = module.multi_label_logit_scale
    log_scale = model.logit_scale if own_scale is None else own_scale
    return total + settings.paper_weight * _contrast(
        module, images, captions, prompts, inputs, log_scale, module.recipe.mixed_images
    )


def _share(count: Tensor) -> Tensor:
    """This rank's count over the mean count of all ranks."""
    return count * num_replicas() / replica_sum(count).clamp(min=1)


@contextmanager
def _plain_attention(on: bool) -> Iterator[None]:
    """Plain attention in half precision on a CPU: for 288 tokens, half the time of the fused kernel, forward and backward."""
    if not on:
        yield
        return
    switch = torch.backends.cuda
    before = switch.fp16_bf16_reduction_math_sdp_allowed()
    switch.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        switch.allow_fp16_bf16_reduction_math_sdp(before)


# A step


def make_optimiser(module: TrainingModule) -> torch.optim.Optimizer:
    """AdamW with weight decay where `has_weight_decay` says so."""
    settings = module.recipe.optimizer
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_learnt().items():
        (decayed if has_weight_decay(name, parameter.ndim) else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    # One pass over each parameter: on a CPU a seventh of the time.
    fused = module.model.device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=fused or None
    )


class StepResult(NamedTuple):
    """What a step came to. loss: the mean over ranks; norm: of the gradient before it is clipped; taken: whether the weights were
    changed; overflowed: float16 could not hold the gradient at its present scale, which is no fault of the batch."""

    loss: float
    norm: float
    taken: bool
    overflowed: bool
    assignments: tuple[Tensor, ...]


def train_step(
    module: TrainingModule,
    optimiser: torch.optim.Optimizer,
    inputs: Inputs,
    *,
    hard: bool,
    place: Place | None = None,
    wrapped: nn.Module | None = None,
    scaler: torch.amp.GradScaler | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> StepResult:
    """One update, left out if the loss or the gradient is no number: nothing has changed then, batch norm's statistics included.

    Args:
        place: of this rank; wrapped: `module` in data-parallel training; None: there is one process.
        scaler: of float16's gradients.
        meanwhile: what to do while a GPU computes.
    """
    module.train()
    scaler = torch.amp.GradScaler(enabled=False) if scaler is None else scaler
    statistics = [(buffer, buffer.clone()) for buffer in module.buffers()]
    optimiser.zero_grad()
    chunk, share = module.recipe.run.chunk_size, len(inputs.pixels)
    if 0 < chunk < share:
        loss, assignments = cached_backward(module, inputs, chunk, hard, wrapped, scaler)
    else:
        loss, assignments = (wrapped or module)(inputs, hard)
        scaler.scale(loss).backward()
    scaler.unscale_(optimiser)
    limit = module.recipe.optimizer.clip_norm or math.inf
    norm = nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], limit)
    meanwhile()
    wide = torch.promote_types(loss.dtype, torch.float32)
    loss_value, norm_value = torch.stack([loss.detach().to(wide), norm.to(wide)]).tolist()
    if place is not None:
        (loss_value,) = place.mean([loss_value])
    taken = math.isfinite(loss_value) and math.isfinite(norm_value)
    overflowed = not taken and math.isfinite(loss_value) and scaler.is_enabled() and scaler.get_scale() > 1.0
    if taken:
        scaler.step(optimiser)
        module.limit_scales()
    else:
        with torch.no_grad():
            for buffer, before in statistics:
                buffer.copy_(before)
    scaler.update()
    return StepResult(loss_value, norm_value, taken, overflowed, tuple(a.detach() for a in assignments))


def cached_backward(
    module: TrainingModule,
    inputs: Inputs,
    chunk: int,
    hard: bool,
    wrapped: nn.Module | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gradients of a whole batch with the towers' activations of `chunk` images in memory at a time.

    Three passes (Gao et al. 2021, "GradCache"): the features of all pieces without gradients; the loss of all of them and its gradient
    with respect to each; every piece once more, with the random state it had before, to carry that gradient on. Batch norm is in
    the projections, which come after the features and see all of them, in the second pass only. So nothing is approximate.
    """
    pieces, device = module.pieces(inputs, chunk), inputs.pixels.device
    assignments: tuple[Tensor, ...] = ()

    def encode(piece: Piece) -> Features:
        nonlocal assignments
        features, seen = module.encode(piece, hard)
        assignments = assignments or seen
        return features

    def again(number: int, gradients: Features) -> Tensor:
        replay = (pieces[number], gradients)
        if wrapped is not None and number + 1 == len(pieces):
            # It waits for the gradient of every parameter, also of those that are complete.
            return cast(Tensor, wrapped(None, hard, replay, touch=True)[0])
        return cast(Tensor, module(None, hard, replay)[0])

    passed = encoded(encode, pieces, device)
    leaves = passed.together()
    loss = module.compare(leaves, inputs)
    (loss if scaler is None else scaler.scale(loss)).backward()
    carried_back(again, passed, {name: leaf.grad for name, leaf in leaves.items()}, device)
    return loss.detach(), assignments


def step_flops(module: TrainingModule, inputs: Inputs) -> float:
    """Floating-point operations of the towers, forward and backward, for these inputs; computed on shapes alone.

    The projections and losses add less than a hundredth at the paper's sizes. What gradient checkpointing and cached features
    compute twice counts once: it is the work that has to be done.
    """
    with _uncompiled(module.model):
        twin = copy.deepcopy(module).to("meta").train()
    twin.recipe = changed(twin.recipe, {"run.precision": "float32"})  # autocast knows no such device
    twin.model.gradient_checkpointing_disable()
    with FlopCounterMode(display=False) as counter:
        features, _ = twin.encode_all(twin.pieces(inputs.to("meta")), hard=False)
        sum(feature.float().sum() for feature in features.values() if feature.requires_grad).backward()  # type: ignore[union-attr]
    return float(counter.get_total_flops())


def peak_flops(recipe: Recipe, device: torch.device) -> float:
    """What one device can do a second: as the recipe says, else as known; 0 for others."""
    if recipe.run.peak_tflops:
        return recipe.run.peak_tflops * 1e12
    if device.type != "cuda" or recipe.run.precision == "float32":
        return 0.0
    called = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
    return next((peak * 1e12 for name, peak in _PEAK_TFLOPS.items() if f" {name} " in called), 0.0)


@torch.no_grad()
def _average(mean: nn.Module, module: nn.Module, decay: float) -> None:
    """Moves the mean of the weights (and of batch norm's statistics) towards the module's."""
    means, values = mean.state_dict(), module.state_dict()
    floating = [name for name, value in values.items() if value.is_floating_point()]
    torch._foreach_lerp_([means[name] for name in floating], [values[name] for name in floating], 1.0 - decay)


# A run


class _Loop:
    """One process of a run, from the first step to the last."""

    def __init__(self, run: Run, place: Place) -> None:
        self.run, self.place, recipe = run, place, run.recipe
        self.first = place.rank == 0
        torch.manual_seed(recipe.run.seed)
        model, scale = start_model(recipe, run.processor)
        self.module = TrainingModule(model, recipe, scale).to(place.device)
        # The weights that are measured and saved: their mean where there is one.
        self.mean = copy.deepcopy(self.module) if recipe.optimizer.ema_decay and run.measures_here else None
        self.optimiser = make_optimiser(self.module)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=recipe.run.precision == "float16")
        if place.rank:
            # Each rank draws its own noise.
            seeds = np.random.SeedSequence([recipe.run.seed, place.rank]).generate_state(1)
            torch.manual_seed(int(seeds[0]))
        if run.resumed is not None:
            with restoring(run.resumed_from):
                self._restore()
        elif self.first:
            run.measure_untrained(self._segmenter(), model.num_parameters())
        if recipe.run.compile:
            tower = cast(Any, model.vision_model)
            tower.run_stages = torch.compile(tower.run_stages)
            cast(Any, model.text_model).forward = torch.compile(model.text_model.forward)
        self.wrapped: nn.Module | None = None
        if place.world > 1:
            devices = [place.device] if place.device.type == "cuda" else None
            # Batch norms see all ranks' images: their statistics are alike. PyTorch 2.13 has another name for leaving them alone.
            new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            alone: Any = {"forward_sync_buffers" if new else "broadcast_buffers": False}
            self.wrapped = DistributedDataParallel(self.module, device_ids=devices, **alone)
        self.log = RunLog(recipe, run.directory, step=run.step, log=run.log) if self.first else None
        self.feed = Feed(run.stream(), partial(Inputs.of, device=place.device))
        self.saved = time.monotonic()
        self.recent: list[float] = []
        self.peak, self.flops = peak_flops(recipe, place.device) * place.world, 0.0

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
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        ahead = run.step + 1 < recipe.schedule.total_steps and self.place.device.type == "cuda"
        result = train_step(
            self.module,
            self.optimiser,
            inputs,
            hard=assigns_hard(recipe, run.step),
            place=self.place,
            wrapped=self.wrapped,
            scaler=self.scaler,
            meanwhile=self.feed.look_ahead if ahead else lambda: None,
        )
        if result.taken:
            if self.mean is not None:
                _average(self.mean, self.module, ema_decay_at(recipe, run.step))
            run.record_step(result.loss)
            self.recent.append(result.loss)
        elif result.overflowed:
            run.record_step(result.loss)
        else:
            run.record_skipped_step(result.loss, result.norm, inputs.arrays())
        if run.step % recipe.run.log_every == 0 or run.finished:
            self._tell(inputs, result, rate)

    def _tell(self, inputs: Inputs, result: StepResult, rate: float) -> None:
        if self.log is None:
            return
        if self.peak and not self.flops:
            self.flops = step_flops(self.module, inputs) * self.place.world
        values = {
            "loss": float(np.mean(self.recent)) if self.recent else math.nan,
            "learning_rate": rate,
            "gradient_norm": result.norm,
            "logit_scale": float(self.module.model.logit_scale.detach().exp()),
            "bad_steps": self.run.bad_steps,
        }
        if self.module.multi_label_logit_scale is not None:
            values[MULTI_LABEL_SCALE] = float(self.module.multi_label_logit_scale.detach().exp())
        if self.scaler.is_enabled():
            values["gradient_scale"] = self.scaler.get_scale()
        measures, warnings = watch_grouping(a[:_IMAGES_WATCHED].float().cpu().numpy() for a in result.assignments)
        self.log.progress(self.run.step, values | measures, flops=self.flops, peak=self.peak)
        for warning in warnings:
            self.run.log(f"step {self.run.step}: {warning}")
        self.recent.clear()

    # -- measuring and saving ---------------------------------------------------------------------------------------------

    @property
    def _best(self) -> TrainingModule:
        return self.mean if self.mean is not None else self.module

    def _segmenter(self) -> Segmenter:
        return Segmenter(self._best.model, self.run.processor, batch_size=50)

    def _measure(self) -> None:
        if not self.run.measures_here:
            return
        with _uncompiled(self._best.model):
            self.run.measure_and_save(_Saving(self._best), self._segmenter(), self.place)
        if self.log is not None:
            self.log.record(self.run.step, self.run.validation.latest())
            self.log.start(self.run.step)

    def _agree(self, stop: int, minutes: float) -> tuple[int, float]:
        """A signal that any rank received, and the first rank's minutes since the last checkpoint: the same on every rank."""
        if self.place.world == 1:
            return stop, minutes
        answers = self.place.mean([float(bool(stop)), minutes if self.first else 0.0])
        return (stop or 15) if answers[0] else 0, answers[1] * self.place.world

    def _save(self) -> bool:
        own = {"data": self.feed.state_dict(), "random": [_text(s) for s in random_state(self.place.device)]}
        ranks = self.place.all(own)
        saved = self.place.all(self._write(ranks) if self.first else False)[0]
        self.saved = time.monotonic()
        return saved

    def _write(self, ranks: Sequence[Mapping[str, Any]]) -> bool:
        arrays = {f"optimizer.{key}.{name}": value for name, key, value in self._moments()}
        if self.mean is not None:
            arrays |= {f"weights.{name}": _array(tensor) for name, tensor in self.module.canonical().items()}
        values = {"scaler": self.scaler.state_dict()}
        saved = self.run.save_checkpoint(_Saving(self._best).save_pretrained, arrays, values, ranks)
        if self.log is not None:
            self.log.start(self.run.step)
        return saved

    def _moments(self) -> Iterator[tuple[str, str, NDArray[Any]]]:
        """The optimizer's state: name of a parameter, "exp_avg", "exp_avg_sq" or "step", value."""
        for name, parameter in self.module.named_learnt().items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                yield name, key, _array(value)

    def _restore(self) -> None:
        """Everything as it was after the step of the checkpoint."""
        run, state = self.run, self.run.resumed
        assert state is not None
        assert run.resumed_from is not None
        arrays = {name: torch.from_numpy(np.array(array)) for name, array in state.arrays.items()}
        saved = _weights(run.resumed_from / MODEL)
        weights = {n.removeprefix("weights."): t for n, t in arrays.items() if n.startswith("weights.")} or saved
        _load(self.module, weights)
        if self.mean is not None:
            _load(self.mean, saved)
        for name, parameter in self.module.named_learnt().items():
            moments = {key: arrays.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(moment is not None for moment in moments.values()):
                on_host = not self.optimiser.defaults.get("fused")
                self.optimiser.state[parameter] = {
                    key: cast(Tensor, moment).to("cpu" if key == "step" and on_host else parameter.device)
                    for key, moment in moments.items()
                }
        if self.scaler.is_enabled() and state.values["scaler"]:
            self.scaler.load_state_dict(dict(state.values["scaler"]))
        ranks = state.values["ranks"]
        # A run of Keras has none that PyTorch knows.
        if len(ranks) == self.place.world and "random" in ranks[self.place.rank]:
            set_random_state([_tensor(text) for text in ranks[self.place.rank]["random"]], self.place.device)


class _Saving:
    """Saves a module's model with the multi-label temperature beside its tensors; loading ignores it."""

    def __init__(self, module: TrainingModule) -> None:
        self.module = module

    def save_pretrained(self, directory: Path) -> None:
        self.module.model.save_pretrained(directory, state_dict=self.module.canonical())


@contextmanager
def _uncompiled(model: GroupViTModel) -> Iterator[None]:
    """Without `torch.compile`: pictures to be measured come in other sizes and numbers than those of training."""
    parts: list[tuple[Any, str]] = [(model.vision_model, "run_stages"), (model.text_model, "forward")]
    taken = [(part, name, part.__dict__.pop(name)) for part, name in parts if name in part.__dict__]
    try:
        yield
    finally:
        for part, name, compiled in taken:
            setattr(part, name, compiled)


def _weights(directory: Path) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(np.array(array))
        for path, names in find_weights(directory).files.items()
        for name, array in read_arrays(path, names)
    }


def _load(module: TrainingModule, weights: Mapping[str, Tensor]) -> None:
    state = module.canonical()
    missing = [name for name in state if name not in weights and name != MULTI_LABEL_SCALE]
    shapes = [n for n, t in state.items() if n in weights and weights[n].shape != t.shape]
    if missing or shapes:
        raise CheckpointError(
            f"the checkpoint is of another model than the recipe's: {(missing or shapes)[0]} "
            f"{'is missing' if missing else 'has another shape'}"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            if name in weights:
                tensor.copy_(weights[name])


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
