"""Modules that stand for others until something in them is used, so that importing what needs them takes less time."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_RUNNING = threading.RLock()


class _Later(ModuleType):
    """In `sys.modules` while others import it; the first use of an attribute imports the true module."""

    _contents: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        _refuse_what_importing_asks(self, name)
        if sys.modules.get(self.__name__) is self and name in self._contents:
            return self._contents[name]
        return getattr(true_module(self.__name__), name)


class _LazyPackage(ModuleType):
    """A package whose `__init__` runs when a name is asked for that it lacks; its submodules are imported without."""

    _has_run = False

    def __getattr__(self, name: str) -> Any:
        _refuse_what_importing_asks(self, name)
        package = self._run()
        return object.__getattribute__(self, name) if package is self else getattr(package, name)

    def __dir__(self) -> list[str]:
        package = self._run()
        return list(super().__dir__()) if package is self else dir(package)

    def _run(self) -> ModuleType:
        """The package, complete. It is another object where `__init__` puts one into `sys.modules`."""
        with _RUNNING:
            if not self._has_run:
                self._has_run = True
                spec = self.__spec__
                assert spec is not None and spec.loader is not None
                spec.loader.exec_module(self)
        return sys.modules.get(self.__name__, self)


class _TrueParents:
    """A finder that imports a put-off package for good when one of its submodules is imported.

    On the path of its stand-in the submodule would run without what `__init__` does before.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        parent = name.rpartition(".")[0]
        if not isinstance(sys.modules.get(parent), _Later):
            return None
        true_module(parent)
        made = sys.modules.get(name)  # by the package itself
        if made is None:
            return find_spec(name)
        made.__spec__ = ModuleSpec(name, _Made(made))  # the import system reads it there
        return made.__spec__


class _Made(Loader):
    """What finds a module that has been imported while it was looked for."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def true_module(name: str) -> ModuleType:
    """The module of this name, imported if it was put off."""
    if isinstance(sys.modules.get(name), _Later):
        sys.modules.pop(name, None)  # another thread may have been here meanwhile
    return importlib.import_module(name)


def call_later(module: str, name: str) -> Callable[..., Any]:
    """A function that imports `module` when it is called, and calls its function `name`."""

    def function(*arguments: Any, **options: Any) -> Any:
        return getattr(true_module(module), name)(*arguments, **options)

    function.__name__ = name
    return function


@contextmanager
def put_off(
    modules: Mapping[str, Mapping[str, Any]], packages: Sequence[str], *, submodules_alone: bool = False
) -> Iterator[None]:
    """While this lasts, importing one of `modules` waits until it is used, and `packages` become lazy for good.

    modules: name → what else its stand-in holds, for those who import single names from it; other names import the true
    module. packages: their submodules are imported alone, their own names when one is asked for. What is loaded or does
    not exist stays as it is. Afterwards no stand-in of `modules` is in `sys.modules`. After an exception the packages,
    too, are as if nothing had been imported.

    submodules_alone: those of `modules` are imported without what these do before, for those of which it is known to do
    no harm. Otherwise a submodule imports its package.
    """
    for name, contents in modules.items():
        if spec := _spec_of_unloaded(name):
            sys.modules[name] = stand_in = _module(spec, _Later)
            vars(stand_in)["_contents"] = contents
    lazy: list[str] = []
    finders: list[Any] = [] if submodules_alone else [_TrueParents()]
    sys.meta_path[:0] = finders
    try:
        for name in packages:
            if (spec := _spec_of_unloaded(name)) and spec.submodule_search_locations:
                sys.modules[name] = _module(spec, _LazyPackage)
                parent, _, child = name.rpartition(".")
                setattr(sys.modules[parent], child, sys.modules[name])
                lazy.append(name)
        yield
    except Exception:
        for name in list(sys.modules):
            if any(name == package or name.startswith(f"{package}.") for package in lazy):
                del sys.modules[name]
        raise
    finally:
        for finder in finders:
            sys.meta_path.remove(finder)
        for name in modules:
            if isinstance(sys.modules.get(name), _Later):
                sys.modules.pop(name, None)


def _refuse_what_importing_asks(module: ModuleType, name: str) -> None:
    """Raises AttributeError for `__path__` and its like, which are asked of every module and must not import one."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")


def _spec_of_unloaded(name: str) -> ModuleSpec | None:
    """None for a module that is loaded or that does not exist."""
    if name in sys.modules:
        return None
    try:
        return find_spec(name)
    except ModuleNotFoundError:  # its package does not exist
        return None


def _module(spec: ModuleSpec, kind: type[ModuleType]) -> ModuleType:
    module = module_from_spec(spec)
    module.__class__ = kind
    return module
