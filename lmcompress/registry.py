"""Parts referenced by name (criteria, losses, matches, quantizers, ramps), and custom parts from a user's code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from pydantic_core import CoreSchema, core_schema

from lmcompress.errors import LmcompressError, nearest

P = TypeVar("P")

SEPARATOR = ":"
"""Separator between module and attribute in the name of a custom part: ``my_package.my_module:my_criterion``."""


class Registry(Mapping[str, P], Generic[P]):
    """The built-in parts of one kind by name; a custom part is passed as an object, or named ``module:attribute``.

    There is no ``register`` function, for the reason that optax and starlette have none: an object that is passed
    needs no name, no import for its side effect and no order of imports, two libraries cannot claim one name, and a
    recipe that says ``my_package.my_module:my_criterion`` says where to look it up.

    Args:
        kind: kind of the parts in messages: ``"criterion"``.
        parts: the built-in parts.
        is_part: whether an object is a part of this kind.
        wanted: description of what ``is_part`` accepts, for messages: ``"a lmcompress.pruning.Criterion"``.

    Example:
        >>> ramps = Registry("ramp", {"linear": float}, callable, "a function of the progress")
        >>> ramps.resolve("linear")
        <class 'float'>
        >>> ramps.resolve("math:sqrt")(4.0)
        2.0
    """

    def __init__(self, kind: str, parts: Mapping[str, P], is_part: Callable[[Any], bool], wanted: str) -> None:
        self.kind = kind
        self._parts = dict(parts)
        self._is_part = is_part
        self._wanted = wanted

    def __getitem__(self, name: str) -> P:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def resolve(self, part: str | P) -> P:
        """The part of this name, or the given one.

        Args:
            part: a built-in name, ``module:attribute`` of a custom part, or a part, which is returned unchanged.

        Raises:
            LmcompressError: If no built-in part has the name, the module cannot be imported, it has no such attribute,
                or the object is not a part of this kind.
        """
        if not isinstance(part, str):
            return self._checked(part, repr(part))
        if part in self._parts:
            return self._parts[part]
        if SEPARATOR in part:
            return self._checked(imported(part, self.kind), part)
        raise LmcompressError(
            f"unknown {self.kind} {part!r}{nearest(part, self._parts)}; "
            f"a custom one is named module{SEPARATOR}attribute"
        )

    def name_of(self, part: str | P) -> str:
        """The name by which :meth:`resolve` finds a part again.

        Args:
            part: a name, which is returned unchanged, or a part.

        Raises:
            LmcompressError: If a custom part cannot be found by its module and name, such as one created in a function.
        """
        if isinstance(part, str):
            return part
        for name, known in self._parts.items():
            if known is part:
                return name
        for name, module in list(sys.modules.items()):
            # a module's own namespace, so that no lazy module imports anything
            for attribute, value in list(getattr(module, "__dict__", {}).items()):
                if value is part and not name.startswith("lmcompress."):
                    return f"{name}{SEPARATOR}{attribute}"
        raise LmcompressError(
            f"the {self.kind} {part!r} has no name to save: assign it to a variable of a module that can be imported"
        )

    def _checked(self, part: Any, name: str) -> P:
        if self._is_part(part):
            return part
        raise LmcompressError(f"{self.kind} {name}: must be {self._wanted}, got {type(part).__name__}")


class PartField:
    """Lets a field of a pydantic model accept a part of a registry: ``Annotated[str | Match, PartField(MATCHES)]``.

    The value stays as given, a name or an object, and is only checked; it is saved by its name.

    Args:
        registry: registry of the parts.
        *words: further accepted values, such as ``"auto"``.
    """

    def __init__(self, registry: Registry[Any], *words: str) -> None:
        self.registry = registry
        self.words = words

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._checked, serialization=core_schema.plain_serializer_function_ser_schema(self.registry.name_of)
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        own = {"type": "string", "pattern": f"^.+{SEPARATOR}.+$"}
        return {"anyOf": [{"enum": [*self.words, *self.registry]}, own]}

    def _checked(self, part: Any) -> Any:
        if part not in self.words:
            self.registry.resolve(part)
        return part


def imported(name: str, kind: str) -> Any:
    """The object that ``module:attribute`` names. The module is searched on Python's path, then in the current folder.

    Args:
        name: with one ``:``.
        kind: kind of the part in messages.

    Raises:
        LmcompressError: If it is not so written, the module cannot be imported or has no such attribute.
    """
    module_name, _, attribute = name.partition(SEPARATOR)
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise LmcompressError(
            f"{kind} {name!r} must be written module{SEPARATOR}attribute, as my_package.my_module{SEPARATOR}my_part"
        )
    # a console script has its own folder on the path, not the one that it is called from
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise LmcompressError(
            f"{kind} {name!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); "
            "it must be installed, or lie in the folder that the command is run from"
        ) from error
    finally:
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]
    if not hasattr(module, attribute):
        raise LmcompressError(
            f"{kind} {name!r}: {module_name} has no {attribute!r}{nearest(attribute, _public(module))}"
        )
    return getattr(module, attribute)


def _public(module: Any) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")]
