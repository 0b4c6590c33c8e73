"""Names that a package exports: those of its `__init__.pyi`, each imported when it is first used."""

from collections.abc import Callable
from functools import cache
from typing import Any


def exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns the `__getattr__` and `__dir__` of a package. The list is not read before a name of it is asked for.

    Args:
        package: its `__name__`.
        file: its `__file__`; the list lies beside it.
    """

    @cache
    def attached() -> Any:
        import lazy_loader  # 10 ms, which `groupvit --help` does without

        return lazy_loader.attach_stub(package, file)

    def get(name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        getter, _, names = attached()
        return names if name == "__all__" else getter(name)

    return get, lambda: attached()[1]()
