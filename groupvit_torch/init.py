"""Initial values by role: the vision tower's as the paper's authors start it, the text tower's as CLIP does.

transformers instead draws most vision weights from normals scaled by width and depth; see docs/differences.md.
"""

import math
from typing import Any

import torch
from torch import nn

from groupvit_torch.layers import EncoderLayer, Projection
from groupvit_torch.text import TextTower
from groupvit_torch.vision import Stage, VisionTower


@torch.no_grad()
def initialise(model: nn.Module, factor: float = 1.0) -> None:
    """Draws the parameters of a model anew, in place.

    - Vision tower: truncated normal of `initializer_range` (0.02) for dense weights, positions and group tokens; zero
      biases;
      PyTorch's default for the patch convolution, times `initializer_factor`.
    - Text tower (CLIP, Radford et al. 2021, section 2.4 and released code): normals of width^-0.5, output layers
      further
      divided by sqrt(2 layers); token embeddings 0.02, positions 0.01. All times `initializer_factor`.
    - Norms start as the identity; projections keep PyTorch's default for dense layers; they are drawn anew for a
      `factor`, the full configuration's `initializer_factor`, that is not 1.
    """
    for module in model.modules():
        if isinstance(module, VisionTower):
            _vision(module)
        elif isinstance(module, TextTower):
            _text(module)
        elif isinstance(module, Projection) and factor != 1.0:
            # Otherwise their constructors have drawn what is wanted: a seed gives the model that it always gave.
            for dense in (module[0], module[3]):
                _default(dense, factor)


def _vision(tower: VisionTower) -> None:
    std = tower.config.initializer_range
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d):
            _default(module, tower.config.initializer_factor)
        elif isinstance(module, Stage) and module.group_token is not None:
            nn.init.trunc_normal_(module.group_token, std=std)
    nn.init.trunc_normal_(tower.embeddings.position_embeddings, std=std)


def _text(tower: TextTower) -> None:
    config = tower.config
    factor, width = config.initializer_factor, config.hidden_size
    into_residual = width**-0.5 / math.sqrt(2 * max(config.num_hidden_layers, 1))
    nn.init.normal_(tower.embeddings.token_embedding.weight, std=factor * 0.02)
    nn.init.normal_(tower.embeddings.position_embedding.weight, std=factor * 0.01)
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif isinstance(module, EncoderLayer):
            attention, mlp = module.self_attn, module.mlp
            for dense in (attention.q_proj, attention.k_proj, attention.v_proj):
                nn.init.normal_(dense.weight, std=factor * width**-0.5)
            nn.init.normal_(attention.out_proj.weight, std=factor * into_residual)
            nn.init.normal_(mlp.fc1.weight, std=factor * (2 * width) ** -0.5)
            nn.init.normal_(mlp.fc2.weight, std=factor * into_residual)


def _default(layer: Any, factor: float) -> None:
    """Draws PyTorch's default, times a factor."""
    layer.reset_parameters()
    for value in layer.parameters():
        value.mul_(factor)
