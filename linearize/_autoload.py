"""Registers the linearized architectures with transformers' Auto classes as soon as both packages are imported, in either order.

Importing transformers here would make `linearize --help` take seconds, so an import finder waits for it. A family's config may be
what imports the Auto classes (for its docstring), and cannot be registered before it is complete: it is waited for too.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO = "transformers.models.auto.modeling_auto"
RUNTIME = "linearize.modeling.modeling_linearized"
CONFIG = re.compile(r"transformers\.models\.\w+\.configuration_\w+")
_waiting = {AUTO, RUNTIME}
_loading: set[str] = set()  # configs whose import has begun


class _Watched(Loader):
    """Runs the real loader, then says that the module is complete."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if CONFIG.fullmatch(name):
            _loading.add(name)
        try:
            self.loader.exec_module(module)
        finally:
            _loading.discard(name)
        _complete(name)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not (name in _waiting or CONFIG.fullmatch(name)) or name in _finding:
            return None
        _finding.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            _finding.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Watched(spec.loader)
        return spec


_finding: set[str] = set()


def _complete(name: str) -> None:
    _waiting.discard(name)
    if name == AUTO and RUNTIME not in sys.modules:
        importlib.import_module(RUNTIME)  # its own loader completes the pair
    elif not (_waiting or _loading):
        register()


def register() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    from linearize.conversion.architectures import ARCHITECTURES
    from linearize.modeling.modeling_linearized import register as register_architectures

    register_architectures(ARCHITECTURES)


def watch() -> None:
    """Wait for transformers' Auto classes, or register now if they are there."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if AUTO in sys.modules:
        _complete(AUTO)
