"""CompressedModel: a wrapper around a ``PreTrainedModel`` that records its compression and saves it reloadable."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.checkpoint.card import model_card
from lmcompress.checkpoint.config import CompressionConfig, recorded_compression
from lmcompress.checkpoint.encoding import encoding_of, weight_count
from lmcompress.checkpoint.layers import layers_of
from lmcompress.checkpoint.saving import (
    Batch,
    Equivalence,
    check_round_trip,
    outputs_of,
    push_folder,
    random_batches,
    replaced_folder,
)
from lmcompress.checkpoint.schema import Provenance, Storage, Structure
from lmcompress.checkpoint.self_loader import write_self_loader
from lmcompress.checkpoint.streams import store_as_streams
from lmcompress.checkpoint.structure import (
    recorded_structure,
    set_stock_shapes,
    stock_structure,
    unless_stock,
    why_not_vanilla,
)
from lmcompress.entropy_coding import CODERS, Coder
from lmcompress.errors import LmcompressError
from lmcompress.families import Anatomy, anatomy_of

SaveFormat = Literal["native", "vanilla", "self_loading"]

REPORT_FILE = "lmcompress.json"


class CompressedModel:
    """A model with a record of its compression.

    Calls and attributes pass through to the inner model. It is not an ``nn.Module``: train ``compressed.model``,
    which is an ordinary ``PreTrainedModel``, so that tensors keep their names in every checkpoint.

    Args:
        model: a model of a family that :mod:`lmcompress.families` describes.
        provenance: origin of the model; default: as recorded in its config.

    Raises:
        UnknownFamilyError: If the family is not known.
    """

    def __init__(self, model: PreTrainedModel, provenance: Provenance | None = None) -> None:
        if not isinstance(model, PreTrainedModel):
            raise LmcompressError(
                f"CompressedModel wraps a transformers PreTrainedModel, got {type(model).__name__}; "
                "load the model with AutoModelFor....from_pretrained first"
            )
        anatomy_of(model)
        self.model = model
        recorded = recorded_compression(model.config)
        known = recorded.provenance if recorded else Provenance()
        # a model cut in memory has shapes in its config, and no history yet
        itself = known if known != Provenance() else Provenance(base_model=_public_name(model))
        self.provenance = provenance or itself

    @classmethod
    def wrap(cls, model: PreTrainedModel | CompressedModel, provenance: Provenance | None = None) -> CompressedModel:
        """The model as a :class:`CompressedModel`; one that is wrapped already is returned unchanged.

        Args:
            model: a model, wrapped or not.
            provenance: origin of the model; default: as recorded in its config.
        """
        return model if isinstance(model, CompressedModel) else cls(model, provenance)

    @classmethod
    def from_pretrained(cls, path: str | Path, auto_class: Any = None, **kwargs: Any) -> CompressedModel:
        """Load any checkpoint, compressed by lmcompress or not.

        Args:
            path: folder, or name on the Hub.
            auto_class: class such as ``AutoModelForSequenceClassification``; default: the class that wrote the
                checkpoint.
            **kwargs: passed to ``from_pretrained``.

        Raises:
            CheckpointError: If the checkpoint is damaged, or its config contradicts itself.
        """
        where = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
        config = AutoConfig.from_pretrained(path, **{k: v for k, v in kwargs.items() if k in where})
        stock_structure(config)  # implausible sizes are refused before a skeleton is built
        recorded_compression(config)
        loader = auto_class if auto_class is not None else _class_of(config)
        model = loader.from_pretrained(path, **kwargs)
        return cls(model)

    @property
    def anatomy(self) -> Anatomy:
        """The inner model seen through its family."""
        return anatomy_of(self.model)

    @property
    def structure(self) -> Structure:
        """The current shapes of the model."""
        return recorded_structure(self.model)

    @property
    def compression(self) -> CompressionConfig:
        """The compression of the model, as it would be written into ``config.json``."""
        return CompressionConfig(
            structure=unless_stock(self.structure, self.model.config),
            provenance=self.provenance,
            encoding=encoding_of(self.model),
            layers=layers_of(self.model),
            storage=Storage(coder=self.storage) if self.storage is not None else None,
        )

    @property
    def storage(self) -> Coder | None:
        """The coder of the checkpoint that the model was loaded from, or None if it had no streams."""
        recorded = recorded_compression(self.model.config)
        return recorded.storage.coder if recorded is not None and recorded.storage is not None else None

    def why_not_vanilla(self) -> str | None:
        """Why this model cannot be saved with a stock config, or None if it can; check before training."""
        if encoding_of(self.model) is not None:
            return (
                "a stock checkpoint has no codes in place of weights and quantizes no activations. A dense one of the "
                "same weights is what lmcompress.checkpoint.encoding.unpacked(model) gives"
            )
        if layers_of(self.model):
            return "a stock checkpoint has full matrices, and every block its own"
        return why_not_vanilla(self.structure, self.model.config)

    def report(self) -> dict[str, Any]:
        """Shapes, parameters, and the formats the model can be saved in, as JSON types."""
        structure = self.structure
        obstacle = self.why_not_vanilla()
        return {
            "family": self.anatomy.family.model_type,
            "architecture": type(self.model).__name__,
            "parameters": weight_count(self.model),
            "hidden_size": self.anatomy.hidden_size,
            "head_size": structure.head_size,
            "blocks": [block.model_dump(exclude_none=True) for block in structure.blocks],
            "layers": [entry.model_dump(mode="json", exclude_defaults=True) for entry in layers_of(self.model)],
            "vanilla": obstacle is None,
            "vanilla_obstacle": obstacle,
            "provenance": self.provenance.model_dump(mode="json"),
        }

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        format: SaveFormat = "native",
        tokenizer: PreTrainedTokenizerBase | None = None,
        batches: Sequence[Batch] | None = None,
        reference: Sequence[Tensor] | None = None,
        tolerance: float = 1e-5,
        storage: Coder | Literal["plain", "as loaded"] = "as loaded",
        report: Mapping[str, Any] | None = None,
        write_more: Callable[[Path], None] | None = None,
    ) -> Equivalence:
        """Write a checkpoint, once a round-trip check has shown that its outputs match those of the model in memory.

        Everything is written to a temporary folder, reloaded, compared on ``batches``, and only then renamed to
        ``folder``: whatever fails, the previous contents of ``folder`` are intact.

        Args:
            folder: destination of the checkpoint.
            format: ``native`` needs ``import lmcompress`` to load; ``vanilla`` is a stock checkpoint, for architectures
                expressible in a stock config; ``self_loading`` carries a loader for those who pass
                ``trust_remote_code=True``.
            tokenizer: saved alongside the model.
            batches: inputs to compare on, preferably real ones; default: two batches of random token ids.
            reference: outputs of the model as trained, before anything was cut, for the same ``batches``
                (see :func:`outputs_of`); default: those of the model now.
            tolerance: max abs difference of outputs allowed, relative to the max abs output.
            storage: a coder of :data:`lmcompress.entropy_coding.CODERS` stores tensors as entropy-coded streams, which
                changes no bit of any weight: pruned, clustered and packed ones become smaller files; ``plain`` uses
                    none;
                the default keeps the storage of the checkpoint that the model came from.
            report: contents of ``lmcompress.json`` and the model card.
            write_more: called with the temporary folder, to add files.

        Returns:
            The measured differences.

        Raises:
            EquivalenceError: If the reloaded model's outputs differ; nothing was written.
            LmcompressError: If ``vanilla`` is requested for a model it cannot express, ``self_loading`` for packed
                weights or compact layers, either with streams, or the disk is full; nothing was written.
        """
        coder = self._coder_for(format, storage)
        inputs = "random" if batches is None else "given"
        batches = random_batches(self.model) if batches is None else list(batches)
        before = list(reference) if reference is not None else outputs_of(self.model, batches)
        with replaced_folder(Path(folder)) as temporary:
            with self._config_for(format, coder):
                self.model.save_pretrained(temporary)
            if coder is not None:
                store_as_streams(temporary, coder)
            if format == "self_loading":
                write_self_loader(self.model, temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            measured = check_round_trip(
                self.model, temporary, batches, before, tolerance=tolerance, inputs=inputs, format=format
            )
            everything = dict(report or {}) | {"model": self.report(), "equivalence": vars(measured), "format": format}
            (temporary / REPORT_FILE).write_text(json.dumps(everything, indent=2, default=str), encoding="utf-8")
            (temporary / "README.md").write_text(model_card(everything), encoding="utf-8")
            if write_more is not None:
                write_more(temporary)
        return measured

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, **save: Any) -> str:
        """Save as :meth:`save_pretrained` does, with a model card, and upload the folder.

        Args:
            repo_id: ``"user/name"``.
            private: whether a newly created repository is private.
            token: access token of the Hub; default: that of the login.
            **save: passed to :meth:`save_pretrained`.

        Returns:
            The URL of the commit.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            self.save_pretrained(folder, **save)
            return push_folder(folder, repo_id, private=private, token=token)

    def _coder_for(self, format: SaveFormat, storage: Coder | Literal["plain", "as loaded"]) -> Coder | None:
        """The coder of the streams to write, after checking format and storage against the model."""
        if storage not in (*CODERS, "plain", "as loaded"):
            raise LmcompressError(f"storage must be {', '.join(CODERS)}, plain or 'as loaded', got {storage!r}")
        if format not in get_args(SaveFormat):
            raise LmcompressError(f"format must be native, vanilla or self_loading, got {format!r}")
        if format == "native":
            return self.storage if storage == "as loaded" else None if storage == "plain" else storage
        if storage in CODERS:
            raise LmcompressError(
                f"streams (storage={storage!r}) need `import lmcompress` to be loaded, format must be native, got "
                f"{format!r}; take storage='plain'"
            )
        if format == "vanilla" and (obstacle := self.why_not_vanilla()):
            raise LmcompressError(
                f"this model has no vanilla form: {obstacle}. Save it as native or self_loading instead"
            )
        lacks = "has no kernels for packed weights" if encoding_of(self.model) else "does not support compact layers"
        if format == "self_loading" and (encoding_of(self.model) or layers_of(self.model)):
            raise LmcompressError(
                "this model has no self_loading form: the loader that travels with a checkpoint rebuilds shapes and "
                f"{lacks}. Save it as native, which `import lmcompress` loads"
            )
        return None

    @contextmanager
    def _config_for(self, format: SaveFormat, coder: Coder | None) -> Iterator[None]:
        """Temporarily set the inner model's config to what the format requires."""
        config = self.model.config
        kept = {name: getattr(config, name) for name in ("quantization_config", "auto_map") if hasattr(config, name)}
        # first: a hidden size that the stock config now expresses is no longer part of the structure
        set_stock_shapes(config, self.structure)
        if format == "vanilla":
            if hasattr(config, "quantization_config"):
                del config.quantization_config
        else:
            config.quantization_config = self.compression
            config.quantization_config.storage = None if coder is None else Storage(coder=coder)
        quantizer = self.model.__dict__.pop("hf_quantizer", None) if format == "vanilla" else None
        try:
            yield
        finally:
            if quantizer is not None:
                self.model.hf_quantizer = quantizer
            for name in ("quantization_config", "auto_map"):
                if name in kept:
                    setattr(config, name, kept[name])
                elif hasattr(config, name):
                    delattr(config, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # only reached for attributes not defined here; "model" itself is missing while unpickling or copying
        if name == "model" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.model, name)

    def __repr__(self) -> str:
        structure = self.structure
        blocks = ", ".join(f"{b.heads}×{structure.head_size}+{b.ffn}" for b in structure.blocks)
        hidden = "" if structure.hidden is None else f", hidden={structure.hidden}"
        return f"CompressedModel({type(self.model).__name__}, blocks=[{blocks}]{hidden})"


def library_version() -> str:
    """The installed version of lmcompress."""
    return version("lmcompress")


def _public_name(model: PreTrainedModel) -> str:
    """Name of a model on the Hub; for a folder only its last part, since a checkpoint may be published."""
    name = str(model.config.name_or_path or "")
    return (Path(name).name if Path(name).exists() else name)[:1024]


def _class_of(config: Any) -> Any:
    name = (config.architectures or [""])[0]
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    return AutoModel
