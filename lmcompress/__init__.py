"""lmcompress: compresses transformer language models by distillation, pruning and quantization, in Hugging Face terms.

Importing this package registers its checkpoint format with Transformers: afterwards, ``AutoModel*.from_pretrained``
rebuilds compressed checkpoints like any other. Where the package is installed, importing torch does it too
(:func:`autoload`). The import itself is cheap: torch and Transformers are imported on first use, so that
``lmcompress --help`` is instant.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lmcompress.errors import CheckpointError, EquivalenceError, LmcompressError, UnknownFamilyError

if TYPE_CHECKING:
    from lmcompress.checkpoint.config import CompressionConfig
    from lmcompress.checkpoint.skeleton import model_from_config
    from lmcompress.families import anatomy_of
    from lmcompress.model import CompressedModel

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CompressedModel",
    "CompressionConfig",
    "EquivalenceError",
    "LmcompressError",
    "UnknownFamilyError",
    "__version__",
    "anatomy_of",
    "model_from_config",
]

_LAZY = {
    "CompressedModel": "lmcompress.model",
    "CompressionConfig": "lmcompress.checkpoint.config",
    "anatomy_of": "lmcompress.families",
    "model_from_config": "lmcompress.checkpoint.skeleton",
}
_QUANTIZERS = "transformers.quantizers.auto"


class _OnFirstUse:
    """The entry for "lmcompress" in Transformers' tables of quantizers: imports the loader on first use."""

    def from_dict(self, *args: Any, **kwargs: Any) -> Any:
        """A :class:`~lmcompress.checkpoint.config.CompressionConfig`: the entry in the table of configs.

        Args:
            *args: passed to ``CompressionConfig.from_dict``.
            **kwargs: likewise.
        """
        return self._loader().CompressionConfig.from_dict(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._loader().LmcompressQuantizer(*args, **kwargs)

    def _loader(self) -> Any:
        loader = importlib.import_module("lmcompress.checkpoint.loader")
        loader.register()
        return loader


class _RegisterWithTransformers(MetaPathFinder):
    """Registers the loader in Transformers' tables as soon as Transformers has created them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the module with the tables, with the entry added after execution; None for every other module.

        Where this package was imported in the middle of that module's own import (which imports torch, and torch the
        entry point), the tables are there at one of the next imports.

        Args:
            fullname: name of the imported module.
            path: path of its package.
            target: unused.
        """
        if fullname != _QUANTIZERS:
            if _have_tables():
                _register()
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _have_tables() -> bool:
    return hasattr(sys.modules.get(_QUANTIZERS), "AUTO_QUANTIZER_MAPPING")


def _register() -> None:
    quantizers = sys.modules[_QUANTIZERS]
    # a self-loading checkpoint registered earlier checks less than this, so it is replaced
    quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING["lmcompress"] = _OnFirstUse()
    quantizers.AUTO_QUANTIZER_MAPPING["lmcompress"] = _OnFirstUse()
    # a new list: another thread may be going through this one
    sys.meta_path = [finder for finder in sys.meta_path if not isinstance(finder, _RegisterWithTransformers)]


if _have_tables():
    _register()
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())


def autoload() -> None:
    """What torch calls once it is imported, by the entry point of pyproject.toml; the import was what it needed.

    So the format is known wherever lmcompress is installed, to command lines and servers too that import torch and
    Transformers only. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` in the environment turns it off, for all packages.
    """


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
