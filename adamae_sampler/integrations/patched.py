"""Classes of patched modules: the exchange of a module's class, and back."""

from __future__ import annotations

from typing import Any, ClassVar, cast
from weakref import WeakValueDictionary

from torch import nn


class HostInterfaceError(TypeError):
    """A host lacks a method or submodule that its patch needs: another version, or another model of the same name."""


class Patched(nn.Module):
    """A module of an exchanged class. Deepcopy and pickle can rebuild that class."""

    host_class: ClassVar[type[nn.Module]]  # the class before the exchange
    mixin: ClassVar[type[Patched]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """`type(patched)(...)` builds an unpatched host, since it gets no settings for a patch."""
        self.__class__ = self.host_class  # type: ignore[assignment]
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        get_state = getattr(self, "__getstate__", None)  # object has one from Python 3.11 on
        return _empty, (self.host_class, self.mixin), get_state() if get_state else self.__dict__


def _empty(host_class: type[nn.Module], mixin: type[Patched]) -> nn.Module:
    patched = patched_type(host_class, mixin)
    return cast(nn.Module, patched.__new__(patched))


def patched_type(host_class: Any, mixin: Any) -> Any:
    """The class with both bases; every call returns the same class. It has the host's class name, because libraries
    recognise models by that name."""
    found = _TYPES.get((host_class, mixin))
    if found is None:
        names = ("__module__", "__qualname__", "__doc__")
        body = {**{name: getattr(host_class, name) for name in names}, "host_class": host_class, "mixin": mixin}
        found = _TYPES[host_class, mixin] = type(host_class.__name__, (mixin, host_class), body)
    return found


_TYPES: WeakValueDictionary[tuple[Any, Any], Any] = WeakValueDictionary()
