"""The records of `groupvit_common.model.outputs`, made known to PyTorch, so that `torch.compile`, `torch.export`,
`DataParallel` and `DistributedDataParallel` find the tensors in them."""

from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree

from groupvit_common.model.outputs import BaseModelOutput, BaseModelOutputWithPooling, GroupViTModelOutput, ModelOutput

__all__ = ["BaseModelOutput", "BaseModelOutputWithPooling", "GroupViTModelOutput", "ModelOutput"]


def _register(record: type[ModelOutput]) -> None:
    def flatten(output: ModelOutput) -> tuple[list[Any], tuple[str, ...]]:
        return list(output.values()), tuple(output)

    def unflatten(values: Iterable[Any], names: tuple[str, ...]) -> ModelOutput:
        return record(zip(names, values, strict=True))

    _pytree.register_pytree_node(
        record, flatten, unflatten, serialized_type_name=f"{record.__module__}.{record.__name__}"
    )


for _record in (BaseModelOutput, BaseModelOutputWithPooling, GroupViTModelOutput):
    _register(_record)
