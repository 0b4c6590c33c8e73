"""The parts of a model as programs, and their files: torch.export, AOTInductor, ONNX, OpenVINO.

`groupvit_common.segmentation.parts` names the parts. Numbers of images, texts, tokens and labels, and the height and
width of images differ from call to call; sides of `pixel_values` are multiples of the patch size, of at least two
patches. Letters are those of that module.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.image_processor import CLIPImageProcessor
from groupvit_common.segmentation.parts import PARTS, Part, ProgramSettings, pixel_scale
from groupvit_common.segmentation.scores import MAX_LOGIT_SCALE
from groupvit_torch.label_maps import grouping_map, label_affinity, similarity
from groupvit_torch.model import GroupViTModel
from groupvit_torch.vision import PatchEmbeddings

METADATA = "groupvit"
"""The key under which files hold what they are, as JSON."""
# What may differ from call to call; of `pixel_values`, in patches.
_DIMS = {"B": "batch", "H": "rows", "W": "columns", "N": "texts", "T": "tokens", "L": "labels"}
# Pillow's parameter of the bicubic kernel.
_PILLOW_A = -0.5


class ImageEncoder(nn.Module):
    """`pixel_values` -> `image_embeds`, `group_embeds`, `grouping`."""

    def __init__(self, model: GroupViTModel) -> None:
        super().__init__()
        # Not the whole model: a program keeps what its module has.
        self.patch_size = model.config.vision_config.patch_size
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        vision = self.vision_model(pixel_values, output_attentions=True, return_dict=True)
        states = vision.last_hidden_state
        groups = self.visual_projection(states.flatten(0, 1)).unflatten(0, (-1, states.shape[1])).float()
        found = {
            "image_embeds": F.normalize(self.visual_projection(vision.pooler_output).float(), dim=-1),
            "group_embeds": F.normalize(groups, dim=-1),
        }
        if vision.attentions:
            grid = (pixel_values.shape[2] // self.patch_size, pixel_values.shape[3] // self.patch_size)
            found["grouping"] = grouping_map([each.float() for each in vision.attentions], grid)
        return found


class TextEncoder(nn.Module):
    """`input_ids`, `attention_mask` -> `text_embeds`."""

    def __init__(self, model: GroupViTModel) -> None:
        super().__init__()
        self.text_model, self.text_projection = model.text_model, model.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        text = self.text_model(input_ids, attention_mask, return_dict=True)
        return {"text_embeds": F.normalize(self.text_projection(text.pooler_output).float(), dim=-1)}


class SegmenterProgram(nn.Module):
    """`pixel_values`, `text_embeds` -> `label_map`, `scores`, `group_map`; without `text_embeds` if labels are baked
    in."""

    def __init__(self, model: GroupViTModel, settings: ProgramSettings) -> None:
        super().__init__()
        self.encoder, self.logit_scale = ImageEncoder(model), model.logit_scale
        options, labels = settings.options.for_model(model.config), settings.labels
        self.is_soft, self.temperature, self.top_k = options.assignment == "soft", options.temperature, options.top_k
        self.background = None if labels is None else labels.background
        self.embeds: Tensor | None
        self.values: Tensor | None
        self.register_buffer("embeds", None if labels is None else torch.tensor(labels.embeds, dtype=torch.float32))
        self.register_buffer("values", None if labels is None else torch.tensor(labels.values, dtype=torch.int32))

    def forward(
        self, pixel_values: Tensor, text_embeds: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """`size`: height and width of the maps; None: those of `pixel_values`."""
        image = self.encoder(pixel_values)
        labels = self.embeds if text_embeds is None else text_embeds
        assert labels is not None
        affinity = self._affinity(image["group_embeds"], labels, image["image_embeds"])
        size = size or (pixel_values.shape[2], pixel_values.shape[3])
        group_map = _resized(image["grouping"], size).argmax(1)  # [B, H, W]
        if self.is_soft:
            maps = torch.einsum("bgl,bghw->blhw", affinity, image["grouping"])
            score, best = _resized(maps, size).max(1)
        else:
            score, best = (each.gather(1, group_map.flatten(1)).unflatten(1, size) for each in affinity.max(-1))
        values = best.int() if self.values is None else self.values[best]
        if self.background is not None:
            limit = affinity.amax(dim=(1, 2)).clamp(max=self.background)
            values = values.masked_fill(score < limit[:, None, None], 0)
        return {"label_map": values, "scores": score, "group_map": group_map.int()}

    def _affinity(self, groups: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        """`[B, G, E]`, `[L, E]`, `[B, E]` -> `[B, G, L]`."""
        scale = self.logit_scale.float().exp()
        if self.top_k is None:
            return label_affinity(groups, labels, scale, temperature=self.temperature)
        # `label_affinity` sorts the labels, of a known number: here the rank of each is counted.
        scaled = scale.clamp(max=MAX_LOGIT_SCALE) / self.temperature * similarity(groups, labels)
        order, found = torch.arange(labels.shape[0], device=labels.device), similarity(images, labels)
        before = (found[:, None] > found[..., None]) | (
            (found[:, None] == found[..., None]) & (order < order[:, None])
        )  # [B, L, L]
        left_out = before.sum(-1) >= self.top_k
        return scaled.softmax(-1) * scaled.masked_fill(left_out[:, None], -torch.inf).softmax(-1)


class Preprocessed(nn.Module):
    """A program whose input is `images`, RGB, uint8 `[B, H, W, 3]`, in the place of `pixel_values`.

    They are resized and normalised as the image processor does it, whose resize is Pillow's: in float32, so that one
    value in ten thousand is one step of 255 away. Maps have the images' height and width.
    """

    def __init__(self, program: nn.Module, image_processor: CLIPImageProcessor) -> None:
        super().__init__()
        self.program, self.image_processor = program, image_processor
        factor, mean, std = pixel_scale(image_processor)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None])
        self.factor = factor

    def forward(self, images: Tensor, text_embeds: Tensor | None = None) -> dict[str, Tensor]:
        height, width = images.shape[1:3]
        rows, columns = self._patches(height, width)
        patch = self.image_processor.size_divisor
        # Both passes of Pillow's resize end with whole numbers.
        wide = _levels(images.permute(0, 3, 1, 2).float() @ pillow_matrix(width, columns * patch, images.device).T)
        pixels = _levels(pillow_matrix(height, rows * patch, images.device) @ wide)
        pixels = (pixels * self.factor - self.mean) / self.std
        if isinstance(self.program, SegmenterProgram):
            return self.program(pixels, text_embeds, (height, width))
        return self.program(pixels)

    def _patches(self, height: int, width: int) -> tuple[int, int]:
        """Returns rows and columns of patches: `CLIPImageProcessor.resized_size` in whole numbers."""
        size, patch = self.image_processor.size, self.image_processor.size_divisor
        shortest, longest = size["shortest_edge"], size["longest_edge"]
        sides = torch.stack([torch.full((), side, dtype=torch.int64) for side in (height, width)])
        short, long = sides.min(), sides.max()
        is_long = shortest * long > longest * short
        # The resized length of a side is this over that, times the side.
        over, under = torch.where(is_long, longest, shortest), torch.where(is_long, long, short)
        count = (2 * over * sides + under * patch) // (2 * under * patch)
        rows, columns = count.clamp(1, longest // patch).tolist()
        torch._check(rows >= 1)
        torch._check(columns >= 1)
        return rows, columns


class PatchProduct(nn.Module):
    """`PatchEmbeddings` as a product of matrices.

    AOTInductor (PyTorch 2.13) reads the input of a convolution in a wrong order where a program computes its size.
    """

    def __init__(self, patches: PatchEmbeddings) -> None:
        super().__init__()
        self.projection = patches.projection

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = True) -> Tensor:
        """`[B, C, H, W]` -> `[B, P, D]`."""
        patch = self.projection.kernel_size[0]
        rows, columns = (side // patch for side in pixel_values.shape[2:])
        blocks = pixel_values.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # [B, C, h, patch, w, patch]
        pixels = blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(pixels, self.projection.weight.flatten(1), self.projection.bias)


def pillow_matrix(n_in: int, n_out: int, device: torch.device) -> Tensor:
    """Returns the matrix `[n_out, n_in]`, float32, of Pillow's bicubic resize along one axis, of any size in a program.

    Unlike `groupvit_common.model.resample`'s, its kernel widens where the image becomes smaller.
    """
    centre, place = (2 * torch.arange(n, device=device) + 1 for n in (n_out, n_in))
    # In whole numbers, which are exact where the kernel is not 0.
    distance = (place * n_out - centre[:, None] * n_in).abs().float() / torch.sym_max(2 * n_in, 2 * n_out)
    near = ((_PILLOW_A + 2) * distance - (_PILLOW_A + 3)) * distance**2 + 1
    far = ((_PILLOW_A * distance - 5 * _PILLOW_A) * distance + 8 * _PILLOW_A) * distance - 4 * _PILLOW_A
    weights = torch.where(distance < 1, near, far.masked_fill(distance >= 2, 0))
    return weights / weights.sum(1, keepdim=True)


def _levels(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0, 255)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def program(model: GroupViTModel, part: Part, settings: ProgramSettings | None = None) -> ExportedProgram:
    """Returns a part as a program of named tensors, in evaluation."""
    was_training = model.training
    settings = settings or ProgramSettings()
    inputs, sizes = _examples(model.config, part.of(settings))
    try:
        exported = torch.export.export(_module(model, part, settings).eval(), (), inputs, dynamic_shapes=sizes)
    finally:
        model.train(was_training)
    for node in exported.graph.nodes:
        # Names of folders of this machine, which are nobody's business where the file goes.
        node.meta.pop("stack_trace", None)
    return exported


def _module(model: GroupViTModel, part: Part, settings: ProgramSettings) -> nn.Module:
    if part.name == "text_encoder":
        return TextEncoder(model)
    module = SegmenterProgram(model, settings) if part.name == "segmenter" else ImageEncoder(model)
    return module if settings.image_processor is None else Preprocessed(module, settings.image_processor)


def _examples(config: GroupViTConfig, part: Part) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
    """Returns inputs, of no size that torch.export takes for a constant, and which of their sizes may change."""
    vision = config.vision_config
    patch = vision.patch_size
    lengths = {"B": 2, "C": vision.num_channels, "H": 3 * patch, "W": 5 * patch, "N": 3, "T": 4, "L": 3, "3": 3}
    lengths["E"] = config.projection_dim
    dims: dict[str, Any] = {axis: Dim(name) for axis, name in _DIMS.items()}
    dims["T"] = Dim(_DIMS["T"], max=config.text_config.max_position_embeddings)
    if "images" in part.inputs:
        dims |= {"H": Dim("height"), "W": Dim("width")}
    else:
        dims |= {axis: patch * dims[axis] for axis in "HW"}
    inputs, sizes = {}, {}
    for name, (dtype, axes) in part.inputs.items():
        names = axes.split()
        inputs[name] = torch.ones([lengths[axis] for axis in names], dtype=getattr(torch, dtype))
        sizes[name] = {index: dims[axis] for index, axis in enumerate(names) if axis in dims}
    return inputs, sizes


def runner(
    model: GroupViTModel, part: Part, settings: ProgramSettings | None = None, **more: Any
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Returns a function of named NumPy arrays that is a part, computed by the model itself.

    more: `size` of a segmenter's maps, see `SegmenterProgram.forward`.
    """
    module = _module(model, part, settings or ProgramSettings()).eval()

    def run_module(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        with torch.no_grad():
            found = module(**tensors, **more)
        return {name: value.numpy() for name, value in found.items()}

    return run_module


def run(
    model: GroupViTModel, part: Part, settings: ProgramSettings | None, inputs: Mapping[str, np.ndarray], **more: Any
) -> dict[str, np.ndarray]:
    """Returns the outputs of a part for NumPy arrays, by the model itself. more: as of `runner`."""
    return runner(model, part, settings, **more)(inputs)


def write(
    to: str, model: GroupViTModel, part: Part, settings: ProgramSettings, path: Path, metadata: Mapping[str, Any]
) -> None:
    """Writes a part as the file of a format."""
    if metadata["dtype"] == "float16" and to != "openvino":
        model = copy.deepcopy(model).half()
    if to == "aoti" and settings.image_processor is not None:
        model = copy.deepcopy(model)
        embeddings = model.vision_model.embeddings
        embeddings.register_module("patch_embeddings", PatchProduct(embeddings.patch_embeddings))
    _WRITERS[to](program(model, part, settings), path, metadata)


def write_torch_export(exported: ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a program for `torch.export.load`."""
    torch.export.save(exported, path, extra_files={METADATA: json.dumps(metadata)})


def write_aoti(exported: ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a package for `torch._inductor.aoti_load_package` and C++: compiled for CPUs like this one."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with _quiet():
        aoti_compile_and_package(
            exported,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": {METADATA: json.dumps(metadata)}},
        )
    hide_folders(path, [str(Path(torch.__file__).parents[1]), cache_dir()])


def hide_folders(package: Path, folders: Sequence[str]) -> None:
    """Removes the names of these folders of this machine from an AOTInductor package: its sources, which nobody reads,
    become empty, and in its library, where messages have them, the names become dots."""
    new = package.with_suffix(".new")
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(new, "w") as archive:
        for entry in old.infolist():
            content = b"" if entry.filename.endswith(".cpp") else old.read(entry)
            if entry.filename.endswith(".so"):
                for folder in map(os.fsencode, folders):
                    content = content.replace(folder, b"." * len(folder))
            archive.writestr(entry.filename, content)
    new.replace(package)


def write_onnx(exported: ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes an ONNX file."""
    outputs = list(exported.call_spec.out_spec.context)
    with _quiet():
        made = torch.onnx.export(exported, dynamo=True, output_names=outputs, verbose=False)
    assert made is not None
    nodes = list(made.model.graph)
    assigning = [str(node.name) for node in nodes if ".downsample.assign" in str(node.metadata_props)]
    for node in nodes:
        # What PyTorch notes of each for itself: a tenth of a small model.
        node.metadata_props.clear()
    made.rename_axes(_axis_names(made.model.graph.inputs))
    made.model.metadata_props[METADATA] = json.dumps(metadata)
    made.save(str(path))
    if metadata["dtype"] == "int8":
        _quantize(path, assigning)


def _axis_names(inputs: Iterable[Any]) -> dict[Any, str]:
    """Returns names for the symbols in the sizes of an ONNX program's inputs, such as s30 in 8*s30."""
    axes = {name: each.split() for part in PARTS.values() for name, (_, each) in part.inputs.items()}
    axes["images"] = ["B", "height", "width", "3"]
    return {
        str(size).rpartition("*")[2]: _DIMS.get(axis, axis)
        for value in inputs
        for axis, size in zip(axes[value.name], value.shape, strict=True)
        if not isinstance(size, int)
    }


def _quantize(path: Path, kept: list[str]) -> None:
    """Rounds the weights of an ONNX file to eight bits, and inputs of products as they come; not in the layers that
    assign patches to groups, `kept`, where a near tie moves whole patches."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        # Without a sign: of signed weights, the sums saturate on x86 CPUs that lack VNNI.
        quantize_dynamic(path, path, nodes_to_exclude=kept, weight_type=QuantType.QUInt8, per_channel=True)


def write_openvino(exported: ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes an OpenVINO model, `path` and the weights beside it."""
    import openvino

    with _onnx_file(exported, path, metadata) as file:
        model = openvino.convert_model(str(file))
    model.set_rt_info(json.dumps(metadata), [METADATA])
    openvino.save_model(model, str(path), compress_to_fp16=metadata["dtype"] == "float16")


@contextmanager
def _onnx_file(exported: ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> Iterator[Path]:
    file = path.with_suffix(".source.onnx")
    write_onnx(exported, file, metadata)
    try:
        yield file
    finally:
        file.unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what compilers say about themselves from users: PyTorch's, and onnxruntime's, which has the root logger."""
    loggers = [logging.getLogger("torch.onnx"), logging.getLogger()]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_WRITERS: dict[str, Callable[[ExportedProgram, Path, Mapping[str, Any]], None]] = {
    "onnx": write_onnx,
    "openvino": write_openvino,
    "torch-export": write_torch_export,
    "aoti": write_aoti,
}
