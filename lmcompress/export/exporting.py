"""The export of a model, from the packed module tree to a checked folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE

from lmcompress.activations.batches import batches_for
from lmcompress.activations.running import evaluating
from lmcompress.checkpoint.saving import random_batches, replaced_folder
from lmcompress.errors import LmcompressError
from lmcompress.export.card import card
from lmcompress.export.check import (
    TOLERANCE,
    Comparison,
    compare,
    expected_outputs,
    products,
    refuse,
    refuse_unless_agreeing,
)
from lmcompress.export.compressed_tensors import EXTRA, CompressedTensorsReport, export_compressed_tensors
from lmcompress.export.config import ExportConfig
from lmcompress.export.differences import first_difference
from lmcompress.export.folder import RECORD, graph_bytes, write_config, write_pooling, write_record, write_tokenizer
from lmcompress.export.gguf import GGUFReport, export_gguf
from lmcompress.export.graph import write_graph
from lmcompress.export.heads import Head
from lmcompress.export.optional import check_exporter
from lmcompress.export.ranges import described, wanted_range, with_ranges
from lmcompress.export.report import ExportReport
from lmcompress.export.runtime import check_ids
from lmcompress.export.sessions import Session, session_of
from lmcompress.export.tasks import head_class
from lmcompress.export.twins import exportable
from lmcompress.families import anatomy_of, inner_model, refuse_foreign


def export_model(
    model: PreTrainedModel,
    path: str | Path,
    config: ExportConfig | None = None,
    *,
    batches: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> ExportReport | CompressedTensorsReport | GGUFReport:
    """Export a model for ONNX Runtime, OpenVINO, as compressed-tensors or GGUF, with its own codes and scales.

    The graph is loaded by its runtime and compared with the model before anything is at ``path``: whatever fails, what
    was there before is intact.

    Args:
        model: packed or not, of any shape; unchanged.
        path: folder to write.
        config: the settings; or give them by name:
        batches: real inputs, for the round-trip check and for calibrating ranges, in any form that
            :func:`~lmcompress.activations.batches.as_batches` takes; default: random ids, for the check only.
        tokenizer: its files are written into the folder.
        **settings: the fields of :class:`ExportConfig`, such as ``to="openvino"``.

    Returns:
        The measurements.

    Raises:
        LmcompressError: If a setting is invalid, a library is missing or too old, the target cannot hold the structure
            or the bits, batches hold what the model cannot read, or ranges must be calibrated and there are no batches,
            or the disk is full; nothing was written.
        EquivalenceError: If the outputs differ in the runtime; nothing was written.
    """
    config = _config(config, settings)
    check_exporter(config.to)
    # a CompressedModel stands for its model, and is no module itself
    model = inner_model(model if issubclass(type(model), nn.Module) else model.model)
    refuse_foreign(model, "export")
    if config.to in (EXTRA, "gguf"):
        real = None if batches is None else _checked(model, batches)
        write = export_gguf if config.to == "gguf" else export_compressed_tensors
        return write(model, path, config, tokenizer=tokenizer, batches=real)
    make = head_class(model, config)
    given = random_batches(model) if batches is None else _checked(model, batches)
    ranged, changed = with_ranges(model, wanted_range(config.activations, config.to), given if batches else None)
    with evaluating(model), evaluating(ranged):
        head = make(ranged, config)
        expected = expected_outputs(head, given)
        original = expected_outputs(make(model, config), given) if changed else None
    twin = make(exportable(ranged, to=config.to), config)
    with replaced_folder(Path(path), marker=RECORD) as folder:
        write_graph(twin, folder, config)
        checked = _Check(head, twin, folder, given, config, "given" if batches else "random")
        comparison = checked.against(expected)
        report = ExportReport(
            path=Path(path),
            to=config.to,
            task=head.task,
            activations=described(ranged),
            bytes=graph_bytes(folder),
            comparison=comparison,
            products=products(folder),
            against_original=None if original is None else checked.measured(original),
            versions=_versions(config),
            notes=_notes(changed, described(ranged), len(given)),
        )
        refuse_unless_agreeing(report.against_original or comparison, config)
        write_config(model, folder)
        write_tokenizer(tokenizer, folder)
        width = anatomy_of(model).hidden_size
        write_pooling(folder, pooling=config.pooling, normalize=config.normalize, width=width)
        write_record(report.as_dict(), folder)
        # the program reads it by the package tokenizers, and slow tokenizers have none
        readable = tokenizer if (folder / FULL_TOKENIZER_FILE).is_file() else None
        (folder / "README.md").write_text(card(report, head, model, readable), encoding="utf-8")
    return report


def _checked(model: PreTrainedModel, batches: Any) -> Sequence[Mapping[str, Tensor]]:
    """Batches that the model can read, in the form of a list."""
    found = batches_for(model, batches)
    for batch in found:
        if "input_ids" not in batch:
            raise LmcompressError(f"batches must have input_ids to export with, got {', '.join(batch)}")
        check_ids(batch["input_ids"], batch.get("attention_mask"), model.config)
    return found


@dataclass
class _Check:
    """The round-trip check of one export."""

    head: Head
    twin: Head
    folder: Path
    batches: Sequence[Mapping[str, Tensor]]
    config: ExportConfig
    inputs: str

    @cached_property
    def session(self) -> Session:
        """The graph in its runtime."""
        # bfloat16 where a runtime chooses it is no error of the graph
        return session_of(self.folder, precision="f32" if self.config.to == "openvino" else None)

    def measured(self, expected: Sequence[tuple[Tensor, ...]]) -> Comparison:
        """The differences from expected outputs."""
        tolerance = self.config.tolerance or TOLERANCE
        return compare(self.head, self.session, self.batches, expected, tolerance=tolerance, inputs=self.inputs)

    def against(self, expected: Sequence[tuple[Tensor, ...]]) -> Comparison:
        """The same; an export that differs is refused, and the first layer that differs is named."""
        found = self.measured(expected)
        if not found.relative_error <= found.tolerance:
            refuse(found, self.config, self._first_difference(found.tolerance))
        return found

    def _first_difference(self, tolerance: float) -> str | None:
        with tempfile.TemporaryDirectory() as scratch, evaluating(self.head.model):
            try:
                return first_difference(self.head, self.twin, Path(scratch), self.batches[0], self.config, tolerance)
            except LmcompressError:
                # a graph with all these outputs is another one; that the export differs is known without it
                return None


def _notes(changed: int, ranges: str, batches: int) -> tuple[str, ...]:
    if not changed:
        return ()
    if "static" in ranges:
        return (f"static ranges of {changed} activations were calibrated on {batches} batches for this export",)
    return (f"{changed} activations have other ranges than in the compressed model: {ranges}",)


def _config(config: ExportConfig | None, settings: dict[str, Any]) -> ExportConfig:
    if config is not None:
        if settings:
            raise LmcompressError(f"settings must be given by config or by name, got both: {', '.join(settings)}")
        return config
    try:
        return ExportConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise LmcompressError(f"{name} of an export: {first['msg']}, got {first['input']!r}") from error


def _versions(config: ExportConfig) -> dict[str, str]:
    names = ["lmcompress", "torch", "transformers", "onnx", "onnxscript"]
    return {name: version(name) for name in (*names, "onnxruntime" if config.to == "onnx" else "openvino")}
