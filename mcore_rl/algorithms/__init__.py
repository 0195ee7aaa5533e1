"""The folder is the registry: a file `name.py` that defines one `Algorithm` is the algorithm `name`.

from mcore_rl.algorithms import available, load
grpo = load("grpo", clip_high=0.28)
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import typing
from typing import Any

from mcore_rl.algorithms.base import Algorithm


def available() -> list[str]:
    """Names that `load` takes."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def load(name: str, **fields: Any) -> Algorithm:
    """The algorithm `name` with its paper's defaults, overridden by `fields`.

    Raises:
        ValueError: unknown name or field (names the nearest), or a value of the wrong type.
    """
    names = available()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown algorithm {name!r}; did you mean {near!r}? available: {', '.join(names)}")
    cls = _class_of(name)
    types = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key, value in fields.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"algorithm {name!r} has no field {key!r}; did you mean {near!r}? fields: {', '.join(known)}"
            )
        fields[key] = _coerce(f"algorithm.{key}", value, types[key])
    return cls(**fields)


def _class_of(name: str) -> type[Algorithm]:
    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and c.__module__ == module.__name__ and issubclass(c, Algorithm)
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one Algorithm, found {found}"
    return found[0]


def _coerce(where: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`; an int is a float, nothing else is converted."""
    kinds = typing.get_args(kind) or (kind,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and bool not in kinds or not isinstance(value, kinds):
        raise ValueError(f"{where}={value!r}: expected {getattr(kind, '__name__', kind)}, got {type(value).__name__}")
    return value
