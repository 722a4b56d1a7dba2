"""CompressedModel: a wrapper around a ``PreTrainedModel`` that records its compression and saves it reloadable."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.checkpoint.by_tensors import LARGE, check_by_tensors
from lmcompress.checkpoint.card import model_card
from lmcompress.checkpoint.config import CompressionConfig, recorded_compression
from lmcompress.checkpoint.encoding import encoding_of, weight_count
from lmcompress.checkpoint.guard import FIELD, guard_config
from lmcompress.checkpoint.layers import layers_of
from lmcompress.checkpoint.pushing import check_destination, push_folder
from lmcompress.checkpoint.saving import (
    Batch,
    Equivalence,
    check_round_trip,
    compared,
    outputs_of,
    random_batches,
    replaced_folder,
    tolerance_of,
)
from lmcompress.checkpoint.schema import Provenance, Storage, Structure
from lmcompress.checkpoint.self_loader import not_carried, write_self_loader
from lmcompress.checkpoint.streams import store_as_streams
from lmcompress.checkpoint.structure import (
    check_config,
    recorded_structure,
    set_stock_shapes,
    unless_stock,
    why_not_vanilla,
)
from lmcompress.entropy_coding import CODERS, Coder
from lmcompress.errors import LmcompressError, nearest
from lmcompress.export import CompressedTensorsReport, ExportConfig, ExportReport, GGUFReport, export_model
from lmcompress.families import Anatomy, anatomy_of, is_described, outline_of, refuse_foreign
from lmcompress.families.refusal import refuse_unproven

SaveFormat = Literal["native", "vanilla", "self_loading"]

REPORT_FILE = "lmcompress.json"

HELD = "_lmcompress_methods"
"""The attribute of a model in which a trainer keeps the methods that have hooks on it."""

_OWN = ("model", "provenance")
_RETURN_MODEL = frozenset(
    "to eval train half float double bfloat16 type cpu cuda xpu ipu mtia to_empty requires_grad_ apply share_memory "
    "dequantize".split()
)
_HUB_ARGUMENTS = frozenset("repo_id commit_message commit_description private token revision create_pr tags".split())
# of Transformers' save_pretrained, and without a meaning here
_WITHOUT_EFFECT = {
    "safe_serialization": (True, None),
    "save_peft_format": (True,),
    "save_original_format": (True,),
    "distributed_checkpoint": (False,),
    "variant": (None,),
}


def refuse_unfinished(methods: Sequence[str], way_out: str) -> None:
    """Refuse to write a model of which methods hold something outside of its weights.

    Args:
        methods: names of those methods; none refuses nothing.
        way_out: what to do, a sentence without its full stop.

    Raises:
        LmcompressError: If there are such methods.
    """
    if methods:
        raise LmcompressError(
            f"{' and '.join(methods)} is not finished: masks and quantizers are outside of the weights, which alone "
            f"are another model. {way_out}"
        )


class CompressedModel:
    """A model with a record of its compression.

    It stands for its inner model wherever that is expected: calls and attributes pass through, ``isinstance`` sees the
    inner model's classes too, and methods that return the model (``to``, ``eval``, ``half``, …) return the wrapper. So
    trainers, ``accelerate.Accelerator.prepare`` and ``pipeline`` take it, and a stock ``Trainer`` saves it by
    :meth:`save_pretrained`. It is no ``nn.Module`` around a module, which would rename all tensors in every checkpoint.

    Args:
        model: a model of a family that :mod:`lmcompress.families` describes.
        provenance: origin of the model; default: as recorded in its config.

    Raises:
        UnknownFamilyError: If the family is not known and the model has no list of blocks.
    """

    model: PreTrainedModel
    provenance: Provenance

    def __init__(self, model: PreTrainedModel, provenance: Provenance | None = None) -> None:
        if type(model) is CompressedModel:
            model, provenance = model.model, provenance or model.provenance
        if not isinstance(model, PreTrainedModel):
            raise LmcompressError(
                f"CompressedModel wraps a transformers PreTrainedModel, got {type(model).__name__}; "
                "load the model with AutoModelFor....from_pretrained first"
            )
        outline_of(model)
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
        return model if type(model) is CompressedModel else cls(model, provenance)

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
        recorded = recorded_compression(config)
        # implausible sizes are refused before a skeleton is built
        check_config(config, None if recorded is None else recorded.structure)
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
            structure=unless_stock(self.structure, self.model.config) if is_described(self.model) else None,
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
        return why_not_vanilla(self.structure, self.model.config) if is_described(self.model) else None

    def report(self) -> dict[str, Any]:
        """Shapes, parameters, and the formats the model can be saved in, as JSON types."""
        obstacle = self.why_not_vanilla()
        return {
            "family": self.model.config.model_type,
            "architecture": type(self.model).__name__,
            "parameters": weight_count(self.model),
            **(self._shapes() if is_described(self.model) else {}),
            "layers": [entry.model_dump(mode="json", exclude_defaults=True) for entry in layers_of(self.model)],
            "vanilla": obstacle is None,
            "vanilla_obstacle": obstacle,
            "provenance": self.provenance.model_dump(mode="json"),
        }

    def _shapes(self) -> dict[str, Any]:
        structure = self.structure
        return {
            "hidden_size": self.anatomy.hidden_size,
            "head_size": structure.head_size,
            "blocks": [block.model_dump(exclude_none=True) for block in structure.blocks],
        }

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        *,
        format: SaveFormat = "native",
        tokenizer: PreTrainedTokenizerBase | None = None,
        batches: Sequence[Batch] | None = None,
        reference: Sequence[Tensor] | None = None,
        tolerance: float | None = None,
        check: Literal["auto", "outputs", "tensors"] = "auto",
        storage: Coder | Literal["plain", "as loaded"] = "as loaded",
        report: Mapping[str, Any] | None = None,
        write_more: Callable[[Path], None] | None = None,
        **hub: Any,
    ) -> Equivalence:
        """Write a checkpoint, once a round-trip check has shown that its outputs match those of the model in memory.

        Everything is written to a temporary folder, read again, compared on ``batches``, and only then renamed to
        ``folder``: whatever fails, the previous contents of ``folder`` are intact.

        Args:
            save_directory: destination of the checkpoint.
            is_main_process: as in Transformers; other processes write nothing.
            state_dict: as in Transformers, default: the model's own; it must be the model in memory, or the round-trip
                check fails.
            push_to_hub: whether to upload the folder too.
            max_shard_size: as in Transformers.
            format: ``native`` needs lmcompress installed to load; ``vanilla`` is a stock checkpoint, for architectures
                expressible in a stock config; ``self_loading`` carries a loader for those who pass
                ``trust_remote_code=True``.
            tokenizer: saved alongside the model.
            batches: inputs to compare on, preferably real ones; default: two batches of random token ids.
            reference: outputs of the model as trained, before anything was cut, for the same ``batches``
                (see :func:`outputs_of`); default: those of the model now.
            tolerance: max abs difference of outputs allowed, relative to the max abs output; default: by dtype
                (:func:`~lmcompress.checkpoint.saving.tolerance_of`).
            check: ``outputs`` reloads the whole model beside the one in memory; ``tensors`` never holds it twice: it
                compares every tensor of the files bit by bit, and runs two blocks of them. ``auto`` takes ``tensors``
                for models of at least :data:`~lmcompress.checkpoint.by_tensors.LARGE` bytes, where there are no
                streams and no loader.
            storage: a coder of :data:`lmcompress.entropy_coding.CODERS` stores tensors as entropy-coded streams, which
                changes no bit of any weight: pruned, clustered and packed ones become smaller files; ``plain`` uses
                    none;
                the default keeps the storage of the checkpoint that the model came from.
            report: contents of ``lmcompress.json`` and the model card.
            write_more: called with the temporary folder, to add files.
            **hub: where to upload, as for :meth:`push_to_hub`: ``repo_id`` (default: the name of the folder),
                ``commit_message``, ``commit_description``, ``private``, ``token``, ``revision``, ``create_pr``,
                ``tags``.

        Returns:
            The measured differences.

        Raises:
            EquivalenceError: If the reloaded model's outputs differ; nothing was written.
            LmcompressError: If ``vanilla`` is requested for a model it cannot express, ``self_loading`` for quantized
                attention or compact layers, either with streams, an argument is not known, training was interrupted, or
                the disk is full; nothing was written.
        """
        hub = _hub_arguments(hub)
        if not is_main_process:
            return Equivalence(max_error=0.0, relative_error=0.0, batches=0, inputs="none")
        folder = Path(save_directory)
        refuse_foreign(self.model, "save as a compressed checkpoint")
        self._refuse_held()
        coder = self._coder_for(format, storage)
        by_tensors = self._by_tensors(check, format, coder)
        inputs = "random" if batches is None else "given"
        batches = random_batches(self.model) if batches is None else list(batches)
        tolerance = tolerance_of(self.model.dtype) if tolerance is None else tolerance
        before = list(reference) if reference is not None else outputs_of(self.model, batches)
        if by_tensors and reference is not None:
            compared(outputs_of(self.model, batches), before, tolerance, inputs, format)
        with replaced_folder(folder) as temporary:
            with self._config_for(format, coder):
                self.model.save_pretrained(temporary, state_dict=state_dict, max_shard_size=max_shard_size)
            if coder is not None:
                store_as_streams(temporary, coder)
            if format == "self_loading":
                write_self_loader(self.model, temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            how: Any = dict(tolerance=tolerance, inputs=inputs, format=format)
            measured = (
                check_by_tensors(self.model, temporary, batches, **how)
                if by_tensors
                else check_round_trip(self.model, temporary, batches, before, **how)
            )
            everything = dict(report or {}) | {"model": self.report(), "equivalence": vars(measured), "format": format}
            (temporary / REPORT_FILE).write_text(json.dumps(everything, indent=2, default=str), encoding="utf-8")
            (temporary / "README.md").write_text(model_card(everything), encoding="utf-8")
            if write_more is not None:
                write_more(temporary)
        if push_to_hub:
            push_folder(folder, hub.pop("repo_id", None) or folder.name, **self._with_tags(hub))
        return measured

    def export(
        self,
        path: str | Path,
        config: ExportConfig | None = None,
        *,
        batches: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> ExportReport | CompressedTensorsReport | GGUFReport:
        """Export the model for ONNX Runtime, OpenVINO, as compressed-tensors or GGUF: see ``export.export_model``.

        Args:
            path: folder to write.
            config: the settings; or give them by name:
            batches: real inputs, for the round-trip check and for calibrating ranges; default: random ids, for the
                check only.
            tokenizer: its files are written into the folder.
            **settings: the fields of :class:`~lmcompress.export.ExportConfig`, such as ``to="openvino"``.

        Returns:
            The measurements.

        Raises:
            LmcompressError: If a setting is invalid, a library is missing or too old, the target cannot hold the model,
                or ranges must be calibrated and there are no batches; nothing was written.
            EquivalenceError: If the outputs differ in the runtime; nothing was written.
        """
        return export_model(self.model, path, config, batches=batches, tokenizer=tokenizer, **settings)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: Sequence[str] | None = None,
        **save: Any,
    ) -> str:
        """Save as :meth:`save_pretrained` does, with a model card, and upload the folder.

        Args:
            repo_id: ``"user/name"``.
            commit_message: message of the commit.
            commit_description: its description.
            private: whether a newly created repository is private.
            token: access token of the Hub; default: that of the login.
            revision: branch; default: the main branch.
            create_pr: whether to open a pull request instead of committing.
            max_shard_size: as in Transformers.
            tags: for the model card, beside those of ``add_model_tags``.
            **save: passed to :meth:`save_pretrained`.

        Returns:
            The URL of the commit.
        """
        where = dict(private=private, token=token, revision=revision, create_pr=create_pr, tags=tags)
        said = dict(commit_message=commit_message, commit_description=commit_description)
        check_destination(repo_id, token=token)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            self.save_pretrained(folder, max_shard_size=max_shard_size, **save)
            return push_folder(folder, repo_id, **self._with_tags(where | said))

    def _with_tags(self, hub: dict[str, Any]) -> dict[str, Any]:
        given = hub.get("tags") or ()
        tags = dict.fromkeys([*([given] if isinstance(given, str) else given), *(self.model.model_tags or ())])
        return {name: value for name, value in (hub | {"tags": list(tags)}).items() if value not in (None, [])}

    def _by_tensors(self, check: str, format: SaveFormat, coder: Coder | None) -> bool:
        """Whether the round trip is checked tensor by tensor, after checking that it can be."""
        if check not in ("auto", "outputs", "tensors"):
            raise LmcompressError(f"check must be auto, outputs or tensors, got {check!r}")
        plain = coder is None and format != "self_loading" and is_described(self.model) and not layers_of(self.model)
        if check == "tensors" and not plain:
            raise LmcompressError(
                "check='tensors' compares plain tensors of native and vanilla checkpoints of known families, this "
                "one has streams, a loader or compact layers, or is of another family; take check='outputs'"
            )
        large = self.model.get_memory_footprint() >= LARGE
        return check == "tensors" or (check == "auto" and plain and large)

    def _refuse_held(self) -> None:
        held = [method.name for method in self.model.__dict__.get(HELD, ()) if not method.goes_on]
        refuse_unfinished(
            held,
            "If training was interrupted, call trainer.finish(), or trainer.release() to go back to the weights alone",
        )

    def _coder_for(self, format: SaveFormat, storage: Coder | Literal["plain", "as loaded"]) -> Coder | None:
        """The coder of the streams to write, after checking format and storage against the model."""
        if storage not in (*CODERS, "plain", "as loaded"):
            raise LmcompressError(f"storage must be {', '.join(CODERS)}, plain or 'as loaded', got {storage!r}")
        if format not in get_args(SaveFormat):
            raise LmcompressError(f"format must be native, vanilla or self_loading, got {format!r}")
        if format != "native":
            refuse_unproven(self.model, "stock" if format == "vanilla" else "self_loading")
        if format == "native":
            return self.storage if storage == "as loaded" else None if storage == "plain" else storage
        if storage in CODERS:
            raise LmcompressError(
                f"streams (storage={storage!r}) need lmcompress to be loaded, format must be native, got "
                f"{format!r}; take storage='plain'"
            )
        if format == "vanilla" and (obstacle := self.why_not_vanilla()):
            raise LmcompressError(
                f"this model has no vanilla form: {obstacle}. Save it as native or self_loading instead"
            )
        if format == "self_loading" and (lacks := not_carried(self.model)):
            raise LmcompressError(
                "this model has no self_loading form: the loader that travels with a checkpoint rebuilds shapes, "
                f"unpacks codes and knows no {lacks}. Save it as native, which loads where lmcompress is installed"
            )
        return None

    @contextmanager
    def _config_for(self, format: SaveFormat, coder: Coder | None) -> Iterator[None]:
        """Temporarily set the inner model's config to what the format requires."""
        config = self.model.config
        names = ("quantization_config", "auto_map", FIELD)
        kept = {name: getattr(config, name) for name in names if hasattr(config, name)}
        # first: a hidden size that the stock config now expresses is no longer part of the structure
        if is_described(self.model):
            set_stock_shapes(config, self.structure)
        if format == "vanilla":
            if hasattr(config, "quantization_config"):
                del config.quantization_config
        else:
            config.quantization_config = self.compression
            config.quantization_config.storage = None if coder is None else Storage(coder=coder)
        guard_config(config, self.why_not_vanilla() is not None)
        quantizer = self.model.__dict__.pop("hf_quantizer", None) if format == "vanilla" else None
        try:
            yield
        finally:
            if quantizer is not None:
                self.model.hf_quantizer = quantizer
            for name in names:
                if name in kept:
                    setattr(config, name, kept[name])
                elif hasattr(config, name):
                    delattr(config, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # isinstance() asks for it after type(): both this class and the inner model's classes are true
        return type(self.__dict__["model"]) if "model" in self.__dict__ else CompressedModel

    def __getattr__(self, name: str) -> Any:
        # only reached for attributes not defined here; "model" itself is missing while unpickling or copying
        if name in _OWN or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        found = getattr(self.model, name)
        if name not in _RETURN_MODEL:
            return found

        @wraps(found)
        def returning_wrapper(*args: Any, **kwargs: Any) -> Any:
            result = found(*args, **kwargs)
            return self if result is self.model else result

        return returning_wrapper

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.model, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.model)})

    def __copy__(self) -> CompressedModel:
        return CompressedModel(copy.copy(self.model), self.provenance)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedModel:
        return CompressedModel(copy.deepcopy(self.model, memo), self.provenance)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return CompressedModel, (self.model, self.provenance)

    def __repr__(self) -> str:
        structure = self.structure
        blocks = ", ".join(f"{b.heads}×{structure.head_size}+{b.ffn}" for b in structure.blocks)
        hidden = "" if structure.hidden is None else f", hidden={structure.hidden}"
        return f"CompressedModel({type(self.model).__name__}, blocks=[{blocks}]{hidden})"


def unwrapped(model: Any) -> Any:
    """A model without any :class:`CompressedModel` in it.

    Args:
        model: anything; a ``PeftModel`` or another module that a :class:`CompressedModel` was given to holds the inner
            model from then on.

    Returns:
        The inner model of a :class:`CompressedModel`, else the same object.
    """
    if type(model) is CompressedModel:
        return model.model
    for module in model.modules() if isinstance(model, nn.Module) else ():
        children: dict[str, Any] = module._modules
        for name, child in children.items():
            if type(child) is CompressedModel:
                children[name] = child.model
    return model


def _hub_arguments(given: dict[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        # accelerate's examples pass save_function, which Transformers ignores too
        if name == "save_function" or value in _WITHOUT_EFFECT.get(name, ()):
            continue
        if name not in _HUB_ARGUMENTS:
            known = sorted(_HUB_ARGUMENTS)
            raise LmcompressError(
                f"save_pretrained does not take {name}={value!r} here{nearest(name, known)}; beside what to save, it "
                f"takes what push_to_hub takes: {', '.join(known)}"
            )
    return {name: value for name, value in given.items() if name in _HUB_ARGUMENTS and value is not None}


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
