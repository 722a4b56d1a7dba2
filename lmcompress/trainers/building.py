"""From the keywords of a trainer to its methods, in the order in which they must act."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.clustering.config import SharingConfig
from lmcompress.clustering.method import WeightSharing
from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.method import Distillation
from lmcompress.distillation.presets import quantgpt, ternarybert
from lmcompress.distillation.teachers import Teachers
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.method import Method
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.costs import CostModel
from lmcompress.pruning.structured.method import StructuredPruning
from lmcompress.pruning.unstructured.config import SparsityConfig
from lmcompress.pruning.unstructured.method import Sparsity
from lmcompress.quantization.config import QuantizationConfig
from lmcompress.quantization.method import Quantization

M = TypeVar("M", bound=Method)
Report = TypeVar("Report")
Methods = Sequence[Method] | Callable[[], Sequence[Method]]

CONFIGS: dict[str, type[BaseModel]] = {
    "distillation": DistillationConfig,
    "pruning": PruningConfig,
    "quantization": QuantizationConfig,
    "sparsity": SparsityConfig,
    "sharing": SharingConfig,
}


@dataclass(frozen=True)
class Asked:
    """What a trainer's keywords ask for; see :class:`~lmcompress.trainers.CompressionTrainer`."""

    methods: Methods = ()
    teacher: Teachers | None = None
    distillation: DistillationConfig | None = None
    pruning: PruningConfig | None = None
    quantization: QuantizationConfig | None = None
    sparsity: SparsityConfig | None = None
    sharing: SharingConfig | None = None
    calibration: Sequence[Mapping[str, Tensor]] | None = None
    cost: CostModel | None = None

    def __post_init__(self) -> None:
        for name, kind in CONFIGS.items():
            if (given := getattr(self, name)) is not None and not isinstance(given, kind):
                raise LmcompressError(
                    f"{name} must be a {kind.__name__}, got {type(given).__name__}; a dictionary becomes one by "
                    f"{kind.__name__}.model_validate(…)"
                )

    def with_defaults(self, **values: Any) -> Asked:
        """The same, with values where nothing was asked for.

        Args:
            **values: defaults by name.
        """
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})

    def build(self, student: Any, *, again: bool = False) -> list[Method]:
        """New methods for a student, in the order in which they are prepared and act.

        Gates are hooked first: quantization and distillation see gated values.

        Args:
            student: the model, not wrapped.
            again: whether methods that were given as objects have served another model before.

        Returns:
            The methods, not prepared yet.

        Raises:
            LmcompressError: If a distillation has no teacher.
        """
        given = list(self.methods() if callable(self.methods) else self.methods)
        if again and not callable(self.methods):
            given = [method.fresh() for method in given]
        own: list[Method] = []
        if self.sparsity is not None:
            own.append(Sparsity(self.sparsity, calibration=self.calibration))
        if self.pruning is not None:
            own.append(StructuredPruning(self.pruning, calibration=self.calibration, cost=self.cost))
        cutting = [method for method in given if method.changes_shapes] if self.quantization is not None else []
        own += cutting
        if self.quantization is not None:
            own.append(Quantization(self.quantization, calibration=self.calibration))
        if self.sharing is not None:
            own.append(WeightSharing(self.sharing, calibration=self.calibration))
        own += self._taught(student, cut=any(method.changes_shapes for method in own))
        return own + [method for method in given if method not in cutting]

    def _taught(self, student: Any, *, cut: bool) -> list[Method]:
        if self.teacher is None:
            if self.distillation is not None:
                raise LmcompressError(
                    "distillation needs a teacher, got none; pass teacher=, or leave distillation out"
                )
            return []
        if self.distillation is not None:
            return [Distillation(self.distillation, self.teacher)]
        if self.quantization is not None:
            return [Distillation(default_distillation(student, self.teacher, cut=cut), self.teacher)]
        return [Distillation(DistillationConfig(), self.teacher)]


def only(methods: Sequence[Method], kind: type[M]) -> M:
    """The first method of a kind.

    Args:
        methods: of a trainer.
        kind: class of the method; a trainer that asks has one.

    Returns:
        The method.
    """
    return next(method for method in methods if isinstance(method, kind))


def finished(report: Report | None) -> Report:
    """The report of a method, available once the trainer has finished.

    Args:
        report: report of the method, or None.

    Raises:
        LmcompressError: If there is none yet.
    """
    if report is None:
        raise LmcompressError("there is no report before finish(): train() calls it at its end")
    return report


def default_distillation(student: PreTrainedModel, teacher: Teachers, *, cut: bool = False) -> DistillationConfig:
    """The default distillation of a quantized student.

    Causal language models, and decoders that read an encoder: logits and contrast of tokens
    (:func:`~lmcompress.distillation.presets.quantgpt`). Others: logits, and hidden states and attention scores of every
    layer (:func:`~lmcompress.distillation.presets.ternarybert`), as far as student and teacher have the same. Labels
    are not used.

    Args:
        student: the model.
        teacher: its teacher; with several, or one that does not run, only logits are used in place of layers.
        cut: whether the student is pruned in the same run, so that its layers and heads will differ from the teacher's.

    Returns:
        The configuration.
    """
    if anatomy_of(student).head is not None or anatomy_of(student).reads_encoder:
        return quantgpt()
    model = teacher if isinstance(teacher, PreTrainedModel) else getattr(teacher, "model", None)
    if cut or not isinstance(model, PreTrainedModel):
        return DistillationConfig(temperature=1.0, label_weight=0.0)
    mine, theirs = anatomy_of(student), anatomy_of(model)
    if len(mine.blocks) != len(theirs.blocks):
        return DistillationConfig(temperature=1.0, label_weight=0.0)
    whole = ternarybert(len(mine.blocks))
    heads = [(a.num_heads, b.num_heads) for a, b in zip(mine.blocks, theirs.blocks, strict=True)]
    kept = [
        match
        for match in whole.matches
        if match.loss == "hidden_mse" or _alike(heads[int(match.student) - 1])  # type: ignore[arg-type]
    ]
    return whole.model_copy(update={"matches": tuple(kept)})


def _alike(heads: tuple[int, int]) -> bool:
    return heads[0] == heads[1] > 0
