"""Imports torchmetrics in two parts: what Lightning reads of it at once, the rest when it is used.

Its `__init__` imports SciPy, transformers and every metric, a fifth of the time until a training's
first step. Lightning, and our own modules, need the base classes only.
`importlib.util.LazyLoader` would import everything for the first of them.
"""

import logging
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from threading import RLock
from types import ModuleType

DEFERRED_PACKAGE = "torchmetrics"
# In this order: torchmetrics.utilities and torchmetrics.metric import each other.
FIRST_PARTS = {
    "__about__": ("__version__",),
    "utilities": (),
    "metric": ("Metric",),
    "collections": ("MetricCollection",),
    "aggregation": ("MeanMetric",),
}
_lock = RLock()  # other threads wait for the one that imports the rest


def defer_torchmetrics() -> None:
    """Makes the next `import torchmetrics` of this process import the base classes only.

    Any other name of the package imports the rest of it, as `import torchmetrics` does.
    """
    if DEFERRED_PACKAGE not in sys.modules:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname != DEFERRED_PACKAGE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(DEFERRED_PACKAGE)
        if spec is not None:
            spec.loader = _FirstParts(spec.loader)
        return spec


class _FirstParts(Loader):
    def __init__(self, loader: Loader):
        self.loader = loader

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        module._logger = logging.getLogger(DEFERRED_PACKAGE)  # its parts read it
        module.__class__ = _Package
        try:
            for part, names in FIRST_PARTS.items():
                loaded = import_module(f"{DEFERRED_PACKAGE}.{part}")
                vars(module).update({name: getattr(loaded, name) for name in names})
        except (ImportError, AttributeError):  # a version that is built in another way
            for name in [name for name in sys.modules if name.startswith(f"{DEFERRED_PACKAGE}.")]:
                del sys.modules[name]
            module.__class__ = ModuleType
            self.loader.exec_module(module)


class _Package(ModuleType):
    """The package, until a name is read that is not imported yet."""

    def __getattr__(self, name: str) -> object:
        with _lock:
            # While the rest is imported, this thread itself reads names that are not there yet.
            if not vars(self).get("_is_importing") and type(self) is _Package:
                self._is_importing = True
                try:
                    self.__spec__.loader.exec_module(self)
                finally:
                    del self._is_importing
                self.__class__ = ModuleType
            return ModuleType.__getattribute__(self, name)
