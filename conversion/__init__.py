"""Foreign GroupViT checkpoints: what they are, what they hold, and the way from each to each (`docs/conversion.md`)."""

from typing import Literal, get_args

# What a checkpoint is converted to. Said here, where the command line sees it without importing what converts.
Target = Literal[
    "native",
    "transformers",
    "transformers-tf",
    "transformers-tf-safetensors",
    "pytorch",
    "keras",
    "nvlabs",
    "savedmodel",
]
TARGETS: tuple[Target, ...] = get_args(Target)
