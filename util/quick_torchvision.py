"""`torchvision`, imported without TorchDynamo, which takes as long to import as PyTorch itself.

torchvision imports one of TorchDynamo's functions, which only some of its operations call, and none of ours.
"""
import importlib
import sys
from types import ModuleType

_NAMES = ("torch._dynamo", "torch._dynamo.utils")


class _Later(ModuleType):
    """In the place of a module: its functions import the module when they are called."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def function(*args, **kwargs):
            _remove()
            return getattr(importlib.import_module(self.__name__), name)(*args, **kwargs)
        return function


def _remove():
    for name in _NAMES:
        if isinstance(sys.modules.get(name), _Later):
            del sys.modules[name]


if "torch._dynamo" not in sys.modules and "torchvision" not in sys.modules:
    sys.modules.update({name: _Later(name) for name in _NAMES})
try:
    import torchvision
finally:
    _remove()

__all__ = ["torchvision"]
