"""Import paths of earlier versions: each still names the module that took its place.

The new module itself is returned, so that classes and functions are the same whichever path a program imports.
"""

import importlib
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from importlib.abc import Loader

_MOVED = {
    f"groupvit_common.{old}": f"groupvit_common.{new}"
    for old, new in {
        "config": "model.config",
        "data.augment": "data.captions.augment",
        "data.classification_sets": "evaluation.datasets.classification",
        "data.segmentation_sets": "evaluation.datasets.segmentation",
        "data.settings": "data.captions.settings",
        "data.sources": "data.captions.sources",
        "data.stream": "data.captions.stream",
        "evaluation_page": "evaluation.page",
        "hub": "checkpoints.hub",
        "image_files": "preprocessing.image_files",
        "image_processor": "preprocessing.image_processor",
        "images": "preprocessing.images",
        "layout": "model.layout",
        "metrics": "evaluation.metrics",
        "parameters": "model.parameters",
        "predictor": "segmentation.predictor",
        "processor": "preprocessing.processor",
        "prompts": "preprocessing.prompts",
        "recipe": "training.recipe",
        "tokenizer": "preprocessing.tokenizer",
        "visualize": "segmentation.figures",
    }.items()
}


class MovedModules:
    """Finds a module under its earlier name, and loads it. (The base classes for both take 20 ms to import.)"""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, cast("Loader", self)) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just set the spec of the earlier name; a module has one, that of its file.
        spec = module.__spec__
        assert spec is not None
        module.__spec__ = spec.loader_state
