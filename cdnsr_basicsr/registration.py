"""How this package's classes come to stand in BasicSR's registries beside those of others."""
from __future__ import annotations

import contextlib
import warnings
from typing import Any, Iterator

SUFFIX = 'cdnsr'  # of names in BasicSR's registries that others have taken
taken_from_basicsr: set[Any] = set()  # archs and losses that have gone upstream


@contextlib.contextmanager
def beside_others(registry: Any, upstream: bool = False) -> Iterator[None]:
    """While this package's modules are imported in it, `@registry.register()` fails at no name that is taken.

    Where another plugin was first, ours is registered with BasicSR's suffix, as NAME_cdnsr, and a warning says so.

    Args:
        registry: One of BasicSR's registries.
        upstream: Whether what has gone upstream is taken from there: then BasicSR's class or function of the same name
            stands in the place of ours, in our module too.
    """

    def register(obj: Any = None, suffix: Any = None) -> Any:
        if obj is None:
            return register
        name = obj.__name__
        if name not in registry:
            registry._do_register(name, obj, suffix)
            return obj
        known = registry.get(name)
        if upstream and known.__module__.split('.')[0] == 'basicsr':
            taken_from_basicsr.add(known)
            return known
        warnings.warn(f'{known.__module__} has already registered a {registry._name} {name} in BasicSR; that of '
                      f'{obj.__module__.split(".")[0]} is {name}_{SUFFIX}')
        registry._do_register(name, obj, SUFFIX)
        return obj

    registry.register = register
    try:
        yield
    finally:
        del registry.register
