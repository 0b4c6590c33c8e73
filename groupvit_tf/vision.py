"""The vision tower: pixels -> patches -> stages of Transformer layers and grouping blocks -> groups (paper, figure 2).

Shapes: B images, P patches, S segments entering a stage, G groups, D width (legend in docs/architecture.md).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from groupvit_common.errors import InputError
from groupvit_common.model.checks import check_pixel_values, noise_per_stage
from groupvit_common.model.config import GroupViTVisionConfig
from groupvit_common.model.resample import CUBIC_A, resize_matrix
from groupvit_tf.compat.model import Keywords, flags
from groupvit_tf.grouping import TokenAssign
from groupvit_tf.layers import Block, EncoderLayer, LayerNorm, MixerMLP, Tensor, Tracked, mean, wide_dtype
from groupvit_tf.outputs import BaseModelOutput, BaseModelOutputWithPooling
from groupvit_tf.variables import ZEROS


class PatchEmbeddings(keras.layers.Layer):
    """`[B, C, H, W]` -> `[B, P, D]`, patches in row-major order."""

    def __init__(self, config: GroupViTVisionConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_channels = config.num_channels
        self.image_size, self.patch_size = (config.image_size,) * 2, (config.patch_size,) * 2
        self.num_patches = (config.image_size // config.patch_size) ** 2
        self.width = config.hidden_size
        # Channels last, the only layout that a CPU computes.
        self.projection = keras.layers.Conv2D(
            config.hidden_size,
            config.patch_size,
            strides=config.patch_size,
            data_format="channels_last",
            kernel_initializer=ZEROS,
            bias_initializer=ZEROS,
            name="projection",
            dtype=self.dtype_policy,
        )

    def build(self, input_shape: Any = None) -> None:
        self.projection.build((None, None, None, self.num_channels))

    def call(self, pixel_values: Tensor, interpolate_pos_encoding: bool = True) -> Tensor:
        patches = self.projection(ops.transpose(pixel_values, (0, 2, 3, 1)))
        _, rows, columns, _ = ops.shape(patches)
        return ops.reshape(patches, (-1, rows * columns, self.width))


class VisionEmbeddings(keras.layers.Layer):
    """Patches with their positions; position embeddings of another image size are interpolated."""

    def __init__(self, config: GroupViTVisionConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.patch_size = config.patch_size
        self.grid = config.image_size // config.patch_size
        self.patch_embeddings = PatchEmbeddings(config, name="patch_embeddings", dtype=self.dtype_policy)
        self.dropout = keras.layers.Dropout(config.dropout, dtype=self.dtype_policy)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, name="layernorm", dtype=self.dtype_policy)

    def build(self, input_shape: Any = None) -> None:
        self.position_embeddings = self.add_weight(
            shape=(1, self.grid**2, self.config.hidden_size), initializer=ZEROS, name="position_embeddings"
        )
        self.patch_embeddings.build()
        self.dropout.build(())
        self.layernorm.build()

    def call(self, pixel_values: Tensor, interpolate_pos_encoding: bool = True, training: bool = False) -> Tensor:
        """`[B, C, H, W]` -> `[B, P, D]`. Positions are interpolated where the size asks for it, whatever the flag."""
        height, width = ops.shape(pixel_values)[-2:]
        patches = self.patch_embeddings(pixel_values)
        positions = self.positions(height // self.patch_size, width // self.patch_size)
        return self.dropout(self.layernorm(patches) + ops.cast(positions, patches.dtype), training=training)

    def positions(self, rows: int | Tensor, columns: int | Tensor) -> Tensor:
        """Returns position embeddings `[1, rows * columns, D]`, bicubic (see `groupvit_common.model.resample`) if the
        grid is not the trained one. A graph of TensorFlow may know its sides only when it runs: they are tensors."""
        stored = ops.convert_to_tensor(self.position_embeddings)
        if isinstance(rows, int) and (rows, columns) == (self.grid, self.grid):
            return stored
        # Interpolated in float32 at least: half-precision weights would lose what little two positions differ by.
        dtype = wide_dtype(stored.dtype)
        rows_matrix, columns_matrix = (cubic_matrix(self.grid, n, dtype) for n in (rows, columns))
        grid = ops.reshape(ops.cast(stored, dtype), (self.grid, self.grid, -1))
        resized = ops.einsum("ri,cj,ijd->rcd", rows_matrix, columns_matrix, grid)
        return ops.cast(ops.reshape(resized, (1, rows * columns, -1)), stored.dtype)


def cubic_matrix(n_in: int, n_out: int | Tensor, dtype: str) -> Tensor:
    """Returns `resize_matrix(n_in, n_out, "bicubic")`, `[n_out, n_in]`; in tensor operations where only a running graph
    knows `n_out`."""
    if isinstance(n_out, int):
        return ops.cast(resize_matrix(n_in, n_out, "bicubic"), dtype)
    # The place of each output, in parts of 1 / (2 n_out), moved by two places so that whole numbers are never negative.
    place = (2 * ops.arange(n_out, dtype="int32") + 1) * n_in - n_out + 4 * n_out
    first = place // (2 * n_out)
    fraction = ops.cast(place - first * (2 * n_out), dtype) / ops.cast(2 * n_out, dtype)
    matrix: Tensor = 0.0
    for tap in (-1, 0, 1, 2):
        distance = ops.abs(fraction - tap)
        near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance * distance + 1
        far = ((CUBIC_A * distance - 5 * CUBIC_A) * distance + 8 * CUBIC_A) * distance - 4 * CUBIC_A
        weight = near if tap in (0, 1) else far
        taken = ops.clip(first - 2 + tap, 0, n_in - 1)
        matrix = matrix + weight[:, None] * ops.one_hot(taken, n_in, dtype=dtype)
    return matrix


def check_pixels(pixel_values: Any, config: GroupViTVisionConfig) -> None:
    """Raises `InputError` for pixels that the tower cannot read, or whose sides are unknown while a graph is traced."""
    dtype = keras.backend.standardize_dtype(pixel_values.dtype)
    shape = tuple(pixel_values.shape)
    check_pixel_values(shape, dtype, "float" in dtype, config)
    if None in shape[2:]:
        raise InputError(
            f"pixel_values must have known sides while a graph is traced, got {list(shape)}; state them in the data "
            "set's "
            f"signature, such as [None, {config.num_channels}, {config.image_size}, {config.image_size}]"
        )


class StageOutput(NamedTuple):
    """The output of a stage; the two in the middle are None where it does not group."""

    segments: Tensor
    """`[B, G, D]`, or `[B, S, D]`."""
    group_tokens: Tensor | None
    assignment: Tensor | None
    """Soft, `[B, G, S]`."""
    ungrouped: Tensor
    """The segments `[B, S, D]` as they entered the grouping block."""


class Stage(Keywords, Tracked, Block):
    """Transformer layers over segments and group tokens together, then (but in the last stage) a grouping block."""

    def __init__(self, config: GroupViTVisionConfig, index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.width = config.hidden_size
        self.num_group_tokens = config.num_group_tokens[index]
        self.depth, self.num_group_token = config.depths[index], config.num_group_tokens[index]
        previous_groups = config.num_output_groups[index - 1] if index else 0
        self.gradient_checkpointing = False
        self.layers = [EncoderLayer(config, name=f"layers.{i}", dtype=policy) for i in range(config.depths[index])]
        self.group_token: Any = None
        self.downsample: TokenAssign | None = None
        self.group_projector: GroupProjector | None = None
        if self.num_group_tokens:
            self.downsample = TokenAssign(
                config, self.num_group_tokens, config.num_output_groups[index], name="downsample", dtype=policy
            )
            if previous_groups:
                self.group_projector = GroupProjector(
                    config, previous_groups, self.num_group_tokens, name="group_projector", dtype=policy
                )

    def build(self, input_shape: Any = None) -> None:
        if self.num_group_tokens:
            self.group_token = self.add_weight(
                shape=(1, self.num_group_tokens, self.width), initializer=ZEROS, name="group_token"
            )
        super().build()

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
        return x if group_token is None else ops.concatenate([x, group_token], axis=1)

    def attend(
        self, segments: Tensor, previous_group_tokens: Tensor | None = None, training: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Applies the layers alone: `[B, S, D]` -> the segments before grouping, and this stage's group tokens."""
        x = segments
        if self.group_token is not None:
            group_tokens = ops.cast(ops.convert_to_tensor(self.group_token), x.dtype)
            if self.group_projector is not None:
                group_tokens = group_tokens + self.group_projector(previous_group_tokens)
            else:
                group_tokens = ops.broadcast_to(group_tokens, (ops.shape(x)[0], self.num_group_tokens, self.width))
            x = self.concat_x(segments, group_tokens)
        for layer in self.layers:
            if self.gradient_checkpointing and training:
                x = layer.rematerialised(x)[0]
            else:
                x = layer(x, training=training)[0]
        return self.split_x(x)

    def call(
        self,
        hidden_states: Tensor,
        prev_group_token: Tensor | None = None,
        output_attentions: bool = True,
        *,
        noise: Tensor | None = None,
        hard: bool = True,
        temperature: float = 1.0,
        training: bool = False,
    ) -> StageOutput:
        """Applies the stage: `[B, S, D]` segments of the previous stage and its group tokens -> its own, the assignment
        always among them."""
        ungrouped, group_tokens = self.attend(hidden_states, prev_group_token, training)
        if self.downsample is None:
            return StageOutput(ungrouped, None, None, ungrouped)
        segments, assignment = self.downsample(
            ungrouped, group_tokens, noise, hard=hard, temperature=temperature, training=training
        )
        return StageOutput(segments, group_tokens, assignment, ungrouped)


class GroupProjector(Block):
    """The share of the previous stage's group tokens in those of a stage: `[B, previous, D]` -> `[B, N, D]`."""

    def __init__(
        self, config: GroupViTVisionConfig, previous_groups: int, num_group_tokens: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        width = config.hidden_size
        self.norm = LayerNorm(width, config.layer_norm_eps, name="0", dtype=self.dtype_policy)
        self.mixer = MixerMLP(config, previous_groups, width // 2, num_group_tokens, name="1", dtype=self.dtype_policy)

    def call(self, x: Tensor) -> Tensor:
        return self.mixer(self.norm(x))


class VisionEncoder(Keywords, Tracked, Block):
    def __init__(self, config: GroupViTVisionConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.stages = [
            Stage(config, index, name=f"stages.{index}", dtype=self.dtype_policy) for index in range(len(config.depths))
        ]

    @flags
    def call(
        self,
        hidden_states: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        *,
        gumbel_noise: Sequence[Tensor] | None = None,
        assign_hard: bool = True,
        assign_temperature: float = 1.0,
        training: bool = False,
    ) -> BaseModelOutput[Tensor]:
        """Applies the stages to patches `[B, P, D]`; arguments as in `VisionTower`.

        Returns: the fields of its record."""
        stages = self.run_stages(
            hidden_states,
            gumbel_noise=gumbel_noise,
            assign_hard=assign_hard,
            assign_temperature=assign_temperature,
            training=training,
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
        training: bool = False,
    ) -> list[StageOutput]:
        """Returns the output of each stage; arguments as in `call`."""
        segments, stages = hidden_states, list(self.stages)
        noise = noise_per_stage(gumbel_noise, [stage.downsample is not None for stage in stages])
        group_tokens: Tensor | None = None
        outputs: list[StageOutput] = []
        for stage, stage_noise in zip(stages, noise, strict=True):
            outputs.append(
                stage(
                    segments,
                    group_tokens,
                    noise=stage_noise,
                    hard=assign_hard,
                    temperature=assign_temperature,
                    training=training,
                )
            )
            segments, group_tokens = outputs[-1].segments, outputs[-1].group_tokens
        return outputs


class VisionTower(Keywords, Block):
    """Pixels -> groups."""

    def __init__(self, config: GroupViTVisionConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.output_shape = (None, config.hidden_size)  # of the pooled image, for `summary`
        self.embeddings = VisionEmbeddings(config, name="embeddings", dtype=self.dtype_policy)
        self.encoder = VisionEncoder(config, name="encoder", dtype=self.dtype_policy)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, name="layernorm", dtype=self.dtype_policy)

    @flags
    def call(
        self,
        pixel_values: Tensor,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        *,
        gumbel_noise: Sequence[Tensor] | None = None,
        assign_hard: bool = True,
        assign_temperature: float = 1.0,
        training: bool = False,
    ) -> BaseModelOutputWithPooling[Tensor]:
        """Args:
            pixel_values: `[B, C, H, W]` floating point, sides multiples of the patch size.
            gumbel_noise: noise for each grouping block in order, `[B, G, S]`; None: drawn in training, none in
                evaluation.
            assign_hard, assign_temperature: see `groupvit_tf.grouping.assign`.

        Returns:
            `last_hidden_state` `[B, G, D]`, `pooler_output` `[B, D]` their mean; `attentions`: per grouping block the
            soft assignment `[B, G, S]`; `hidden_states`: the patches, then every stage's output.
        """
        encoded = self.encoder(
            self.embeddings(pixel_values, training=training),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            gumbel_noise=gumbel_noise,
            assign_hard=assign_hard,
            assign_temperature=assign_temperature,
            training=training,
        )
        groups = self.layernorm(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=groups,
            pooler_output=mean(groups, axis=1),
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
        training: bool = False,
    ) -> tuple[Tensor, list[StageOutput]]:
        """Returns the patches `[B, P, D]` and the output of each stage, for training; arguments as in `call`."""
        patches = self.embeddings(pixel_values, training=training)
        return patches, self.encoder.run_stages(
            patches,
            gumbel_noise=gumbel_noise,
            assign_hard=assign_hard,
            assign_temperature=assign_temperature,
            training=training,
        )
