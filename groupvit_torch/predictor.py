"""The segmenter: images and labels -> label maps. `groupvit_common.segmentation.predictor` holds what is not
PyTorch."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from groupvit_common.model.optimization import Optimized
from groupvit_common.segmentation.encoded import Blocks
from groupvit_common.segmentation.label_maps import PixelLabels, View
from groupvit_common.segmentation.options import DEFAULT_MODEL, SegmentationOptions
from groupvit_common.segmentation.predictor import DEMO_MODEL, BaseSegmenter
from groupvit_common.segmentation.scores import Floats
from groupvit_torch.checkpoint import usable_device
from groupvit_torch.label_maps import grouping_map, image_probabilities, label_affinity, pixel_labels, view_scores
from groupvit_torch.model import GroupViTModel

__all__ = ["DEFAULT_MODEL", "DEMO_MODEL", "Segmenter"]


class Segmenter(BaseSegmenter):
    __doc__ = BaseSegmenter.__doc__
    model: GroupViTModel

    @classmethod
    def _device(cls, wanted: Any) -> torch.device:
        return usable_device(_best_device() if wanted is None else wanted)

    @classmethod
    def _load(cls, directory: Path, dtype: Any, device: Any) -> GroupViTModel:
        return GroupViTModel.from_pretrained(directory, dtype=dtype, device=device)

    @classmethod
    def _optimized(cls, model: GroupViTModel, request: Mapping[str, Any]) -> Optimized:
        # Imported here: most runs do without.
        from groupvit_torch.optimize import optimize

        return optimize(model, **request)

    def _ready(self, model: GroupViTModel) -> GroupViTModel:
        model.check_finite()
        return model.eval()

    @torch.no_grad()
    def _embed_texts(self, tokens: Mapping[str, npt.NDArray[np.int64]]) -> Floats:
        inputs: dict[str, Any] = {name: torch.from_numpy(ids).to(self.model.device) for name, ids in tokens.items()}
        embeds = self.model.get_text_features(**inputs)
        assert isinstance(embeds, Tensor)
        return _wide(embeds).cpu().numpy()

    @torch.no_grad()
    def _classify(self, pixels: Floats, label_embeds: Floats) -> Floats:
        embeds = self.model.get_image_features(torch.from_numpy(pixels).to(self.model.device))
        assert isinstance(embeds, Tensor)
        return image_probabilities(_wide(embeds), self._to_device(label_embeds), self._scale()).cpu().numpy()

    @torch.no_grad()
    def _group(self, pixels: Floats, label_embeds: Floats) -> tuple[Floats, Tensor, Tensor]:
        groups, images, block_maps = self._encode_images(pixels)
        return *self._compared(groups, images, label_embeds), block_maps[-1]

    @torch.no_grad()
    def _blocks(self, pixels: Floats) -> Blocks:
        groups, images, block_maps = self._encode_images(pixels)
        return groups.cpu().numpy(), images.cpu().numpy(), [maps.cpu().numpy() for maps in block_maps]

    @torch.no_grad()
    def _compare(
        self, group_embeds: Floats, image_embeds: Floats, grouping: Floats, label_embeds: Floats
    ) -> tuple[Floats, Tensor, Tensor]:
        arrays = (group_embeds, image_embeds, grouping)
        groups, images, maps = (torch.from_numpy(each).to(self.model.device) for each in arrays)
        return *self._compared(groups, images, label_embeds), maps

    @torch.no_grad()
    def _embed_images(self, pixels: Floats) -> Floats:
        embeds = self.model.get_image_features(torch.from_numpy(pixels).to(self.model.device))
        assert isinstance(embeds, Tensor)
        return _wide(embeds).cpu().numpy()

    def _stack(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([*parts])

    def _may_label_in_threads(self) -> bool:
        # Threads share the queue of an accelerator, which on some ("mps") they must not.
        return bool(self.model.device.type == "cpu")

    def _pixel_labels(
        self,
        views: Sequence[View],
        pixels: Floats,
        size: tuple[int, int],
        options: SegmentationOptions,
        is_background: Sequence[bool],
    ) -> PixelLabels:
        return pixel_labels(views, pixels, size, options, is_background)

    def _view_scores(self, view: View, size: tuple[int, int]) -> Iterator[Floats]:
        return (scores.cpu().numpy() for _, scores in view_scores(view, size, self.options))

    def _encode_images(self, pixels: Floats) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Images `[B, 3, H, W]` -> embeddings of groups `[B, G, E]` and images `[B, E]`, grouping map of each block."""
        vision = self.model.vision_model(
            torch.from_numpy(pixels).to(self.model.device), output_attentions=True, return_dict=True
        )
        groups = self.model.visual_projection(vision.last_hidden_state.flatten(0, 1))
        groups = _wide(groups.unflatten(0, (len(pixels), -1)))
        images = _wide(self.model.visual_projection(vision.pooler_output))
        patch = self.model.config.vision_config.patch_size
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        assignments = [_wide(a) for a in vision.attentions]
        return groups, images, [grouping_map(assignments[: i + 1], grid) for i in range(len(assignments))]

    def _compared(self, groups: Tensor, images: Tensor, label_embeds: Floats) -> tuple[Floats, Tensor]:
        """Embeddings of groups `[B, G, E]` and images `[B, E]`, labels -> probabilities `[B, L]`, affinities
        `[B, G, L]`."""
        labels, scale = self._to_device(label_embeds), self._scale()
        affinity = label_affinity(groups, labels, scale, images, self.options.top_k, self.options.temperature)
        return image_probabilities(images, labels, scale).cpu().numpy(), affinity

    def _to_device(self, label_embeds: Floats) -> Tensor:
        return torch.from_numpy(label_embeds).to(self.model.device, self._scale().dtype)

    def _scale(self) -> Tensor:
        return _wide(self.model.logit_scale.detach()).exp()


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
