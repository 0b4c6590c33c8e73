"""The vision tower: pixels -> patches -> stages of Transformer layers and grouping blocks -> groups (paper, figure 2).

Shapes: B images, P patches, S segments entering a stage, G groups, D width (legend in docs/architecture.md).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.jit._trace import is_tracing
from torch.utils.checkpoint import checkpoint

from groupvit_common.model.checks import check_pixel_values, noise_per_stage
from groupvit_common.model.config import GroupViTVisionConfig
from groupvit_common.model.resample import CUBIC_A, resize_matrix
from groupvit_torch.compat.model import flags
from groupvit_torch.grouping import TokenAssign
from groupvit_torch.layers import EncoderLayer, MixerMLP
from groupvit_torch.outputs import BaseModelOutput, BaseModelOutputWithPooling


class PatchEmbeddings(nn.Module):
    """`[B, C, H, W]` -> `[B, P, D]`, patches in row-major order."""

    def __init__(self, config: GroupViTVisionConfig) -> None:
        super().__init__()
        self.image_size, self.patch_size = (config.image_size,) * 2, (config.patch_size,) * 2
        self.num_patches = (config.image_size // config.patch_size) ** 2
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = True) -> Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


def bicubic(x: Tensor, axis: int, size: int) -> Tensor:
    """Returns `x` with `size` places along an axis, by `groupvit_common.model.resample`'s bicubic interpolation.

    It is in tensor operations, so that a program may have any size.
    """
    n = x.shape[axis]
    # The place of each output, in parts of 1 / (2 size), moved by two places so that whole numbers are never negative.
    place = (2 * torch.arange(size, device=x.device) + 1) * n - size + 4 * size
    first = place // (2 * size)
    fraction = (place - first * (2 * size)).to(x.dtype) / (2 * size)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for tap in (-1, 0, 1, 2):
        distance = (fraction - tap).abs()
        near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance**2 + 1
        far = ((CUBIC_A * distance - 5 * CUBIC_A) * distance + 8 * CUBIC_A) * distance - 4 * CUBIC_A
        weight = near if tap in (0, 1) else far
        shape = [1] * x.ndim
        shape[axis] = -1
        total = total + x.index_select(axis, (first - 2 + tap).clamp(0, n - 1)) * weight.view(shape)
    return total


def _is_symbolic(size: Any) -> bool:
    """Returns whether a program is being made for all sizes."""
    return isinstance(size, torch.SymInt)


class VisionEmbeddings(nn.Module):
    """Patches with their positions; position embeddings of another image size are interpolated."""

    def __init__(self, config: GroupViTVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_size = config.patch_size
        self.grid = config.image_size // config.patch_size
        self.patch_embeddings = PatchEmbeddings(config)
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.grid**2, config.hidden_size))
        self.dropout = nn.Dropout(config.dropout)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = True) -> Tensor:
        """`[B, C, H, W]` -> `[B, P, D]`. Positions are interpolated where the size asks for it, whatever the flag."""
        is_float = pixel_values.is_floating_point()
        if not is_tracing():
            check_pixel_values(pixel_values.shape, str(pixel_values.dtype), is_float, self.config)
        height, width = pixel_values.shape[-2:]
        # A user's float32 pixels go into a half-precision model without a word; autocast does its own casting.
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.projection.weight.dtype))
        positions = self.positions(height // self.patch_size, width // self.patch_size)
        return self.dropout(self.layernorm(patches) + positions)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Returns position embeddings `[1, rows * columns, D]`, bicubic (see `groupvit_common.model.resample`) if the
        grid is not the trained one."""
        stored = self.position_embeddings
        # Interpolated in float32 at least: half-precision weights would lose what little two positions differ by.
        dtype = torch.promote_types(stored.dtype, torch.float32)
        if _is_symbolic(rows) or _is_symbolic(columns):
            # A program for all sizes, those of training among them.
            resized = stored.to(dtype).unflatten(1, (self.grid, self.grid))[0]
            resized = bicubic(bicubic(resized, 0, rows), 1, columns)
            return resized.flatten(0, 1)[None].to(stored.dtype)
        if (rows, columns) == (self.grid, self.grid):
            return stored
        rows_matrix, columns_matrix = (
            torch.tensor(resize_matrix(self.grid, n, "bicubic"), dtype=dtype, device=stored.device)
            for n in (rows, columns)
        )
        grid = stored.to(dtype).unflatten(1, (self.grid, self.grid))[0]
        return torch.einsum("ri,cj,ijd->rcd", rows_matrix, columns_matrix, grid).flatten(0, 1)[None].to(stored.dtype)


class StageOutput(NamedTuple):
    """The output of a stage; the two in the middle are None where it does not group."""

    segments: Tensor
    """`[B, G, D]`, or `[B, S, D]`."""
    group_tokens: Tensor | None
    assignment: Tensor | None
    """Soft, `[B, G, S]`."""
    ungrouped: Tensor
    """The segments `[B, S, D]` as they entered the grouping block."""


class Stage(nn.Module):
    """Transformer layers over segments and group tokens together, then (but in the last stage) a grouping block."""

    def __init__(self, config: GroupViTVisionConfig, index: int) -> None:
        super().__init__()
        width = config.hidden_size
        num_group_tokens = config.num_group_tokens[index]
        previous_groups = config.num_output_groups[index - 1] if index else 0
        self.depth, self.num_group_token = config.depths[index], num_group_tokens
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.depths[index]))
        self.group_token: nn.Parameter | None = None
        self.downsample: TokenAssign | None = None
        self.group_projector: nn.Sequential | None = None
        if num_group_tokens:
            self.group_token = nn.Parameter(torch.zeros(1, num_group_tokens, width))
            self.downsample = TokenAssign(config, num_group_tokens, config.num_output_groups[index])
            if previous_groups:
                self.group_projector = nn.Sequential(
                    nn.LayerNorm(width, eps=config.layer_norm_eps),
                    MixerMLP(config, previous_groups, width // 2, num_group_tokens),
                )

    @property
    def with_group_token(self) -> bool:
        return self.group_token is not None

    def split_x(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the segments and the group tokens of `[B, S + N, D]`."""
        if self.group_token is None:
            return x, None
        return x[:, : -self.num_group_token], x[:, -self.num_group_token :]

    def concat_x(self, x: Tensor, group_token: Tensor | None = None) -> Tensor:
        """Returns segments and group tokens as one sequence."""
        return x if group_token is None else torch.cat([x, group_token], dim=1)

    def attend(self, segments: Tensor, previous_group_tokens: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Applies the layers alone: `[B, S, D]` -> the segments before grouping, and this stage's group tokens."""
        x = segments
        if self.group_token is not None:
            group_tokens = self.group_token.expand(segments.shape[0], -1, -1)
            if self.group_projector is not None:
                group_tokens = group_tokens + self.group_projector(previous_group_tokens)
            x = self.concat_x(segments, group_tokens)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, use_reentrant=False)[0]
            else:
                x = layer(x)[0]
        return self.split_x(x)

    def forward(
        self,
        hidden_states: Tensor,
        prev_group_token: Tensor | None = None,
        output_attentions: bool = True,
        *,
        noise: Tensor | None = None,
        hard: bool = True,
        temperature: float = 1.0,
    ) -> StageOutput:
        """Applies the stage: `[B, S, D]` segments of the previous stage and its group tokens -> its own, the assignment
        always among them."""
        ungrouped, group_tokens = self.attend(hidden_states, prev_group_token)
        if self.downsample is None:
            return StageOutput(ungrouped, None, None, ungrouped)
        segments, assignment = self.downsample(ungrouped, group_tokens, noise, hard, temperature)
        return StageOutput(segments, group_tokens, assignment, ungrouped)


class VisionEncoder(nn.Module):
    def __init__(self, config: GroupViTVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(config.depths)))

    @flags
    def forward(
        self,
        hidden_states: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        *,
        gumbel_noise: Sequence[Tensor] | None = None,
        assign_hard: bool = True,
        assign_temperature: float = 1.0,
    ) -> BaseModelOutput[Tensor]:
        """Applies the stages to patches `[B, P, D]`; arguments as in `VisionTower`.

        Returns: the fields of its record."""
        stages = self.run_stages(
            hidden_states, gumbel_noise=gumbel_noise, assign_hard=assign_hard, assign_temperature=assign_temperature
        )
        assignments = tuple(stage.assignment for stage in stages if stage.assignment is not None)
        return BaseModelOutput(
            last_hidden_state=stages[-1].segments,
            hidden_states=(hidden_states, *(stage.segments for stage in stages)) if output_hidden_states else None,
            attentions=assignments if output_attentions else None,
        )

    def run_stages(
        self,
        hidden_states: Tensor,
        *,
        gumbel_noise: Sequence[Tensor] | None = None,
        assign_hard: bool = True,
        assign_temperature: float = 1.0,
    ) -> list[StageOutput]:
        """Returns the output of each stage; arguments as in `forward`."""
        segments, stages = hidden_states, list(self.stages)
        noise = noise_per_stage(gumbel_noise, [stage.downsample is not None for stage in stages])
        group_tokens: Tensor | None = None
        outputs: list[StageOutput] = []
        for stage, stage_noise in zip(stages, noise, strict=True):
            outputs.append(
                stage(segments, group_tokens, noise=stage_noise, hard=assign_hard, temperature=assign_temperature)
            )
            segments, group_tokens = outputs[-1].segments, outputs[-1].group_tokens
        return outputs


class VisionTower(nn.Module):
    """Pixels -> groups."""

    def __init__(self, config: GroupViTVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @flags
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        *,
        gumbel_noise: Sequence[Tensor] | None = None,
        assign_hard: bool = True,
        assign_temperature: float = 1.0,
    ) -> BaseModelOutputWithPooling[Tensor]:
        """Args:
            pixel_values: `[B, C, H, W]` floating point, sides multiples of the patch size.
            gumbel_noise: noise for each grouping block in order, `[B, G, S]`; None: drawn in training, none in
                evaluation.
            assign_hard, assign_temperature: see `groupvit_torch.grouping.assign`.

        Returns:
            `last_hidden_state` `[B, G, D]`, `pooler_output` `[B, D]` their mean; `attentions`: per grouping block the
            soft assignment `[B, G, S]`; `hidden_states`: the patches, then every stage's output.
        """
        encoded = self.encoder(
            self.embeddings(pixel_values),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            gumbel_noise=gumbel_noise,
            assign_hard=assign_hard,
            assign_temperature=assign_temperature,
        )
        groups = self.layernorm(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=groups,
            pooler_output=groups.mean(dim=1),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def run_stages(
        self,
        pixel_values: Tensor,
        *,
        gumbel_noise: Sequence[Tensor] | None = None,
        assign_hard: bool = True,
        assign_temperature: float = 1.0,
    ) -> tuple[Tensor, list[StageOutput]]:
        """Returns the patches `[B, P, D]` and the output of each stage, for training; arguments as in `forward`."""
        patches = self.embeddings(pixel_values)
        return patches, self.encoder.run_stages(
            patches, gumbel_noise=gumbel_noise, assign_hard=assign_hard, assign_temperature=assign_temperature
        )
