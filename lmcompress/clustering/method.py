"""Weight clustering as a method of the trainer: the codebooks of the matrices are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmcompress.activations.batches import batches_for
from lmcompress.clustering.config import SharingConfig
from lmcompress.clustering.kmeans import Clusters, kmeans, look_up, sum_by_cluster
from lmcompress.clustering.planning import Planned, plan
from lmcompress.clustering.report import SharedMatrix, SharingReport
from lmcompress.clustering.sensitivity import fisher_diagonal
from lmcompress.errors import LmcompressError
from lmcompress.families import inner_model
from lmcompress.method import SteppedMethod, calibration_rows
from lmcompress.model import CompressedModel, unwrapped
from lmcompress.numerics.errors import relative_error

Batch = Mapping[str, Tensor]


class SharedWeight(nn.Module):
    """The codebook of one matrix and the index of each weight.

    Attributes:
        codebook: ``(clusters,)``, float32 or wider: the trained values besides zero.
        indices: same shape as the stored matrix, as in :class:`~lmcompress.clustering.kmeans.Clusters`.
        zero: whether index 0 stands for a weight that stays zero.

    Args:
        found: the clusters of the matrix.
    """

    indices: Tensor

    def __init__(self, found: Clusters) -> None:
        super().__init__()
        self.codebook = nn.Parameter(found.centroids.clone())
        self.zero = found.zero
        self.register_buffer("indices", found.indices)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Set every weight to the value of its cluster.

        Args:
            weight: the stored weight; modified in place.
        """
        weight.copy_(look_up(self.codebook, self.indices, zero=self.zero))

    @torch.no_grad()
    def holds(self, weight: Tensor) -> bool:
        """Whether every weight has the value of its cluster.

        Args:
            weight: the stored weight.
        """
        return torch.equal(weight, look_up(self.codebook, self.indices, zero=self.zero).to(weight.dtype))

    @torch.no_grad()
    def gather(self, weight: Tensor) -> None:
        """Turn the gradient of the weights into that of the codebook.

        Args:
            weight: the stored weight; its gradient is removed.
        """
        if weight.grad is None:
            return
        sums = sum_by_cluster(weight.grad, self.indices, clusters=len(self.codebook), zero=self.zero)
        self.codebook.grad = sums.to(self.codebook.dtype)
        weight.grad = None


class WeightSharing(SteppedMethod):
    """Clusters the weights of each matrix (weight sharing), and trains the codebook.

    Every matrix is clustered when training begins. Afterwards weights only change with their shared value: the
    gradient of a value is the sum of the gradients of its weights, and the assignment of weights to values is fixed.
    Weights that are 0 stay 0. The rest of the model (biases, norms, other matrices) is trained as usual.

    The model remains an ordinary one throughout, with few distinct values in its matrices; entropy-coded storage
    detects them.

    Args:
        config: number of values for each matrix; default: Deep Compression's.
        calibration: batches with labels, preferably of one row each, for the sensitivity; default: training rows.

    Attributes:
        report: the resulting clusters; set by :meth:`finish`.
        max_norm: gradients are clipped as gradients of the weights, before they are summed, and not again.

    Note:
        Deep Compression looks values up in every forward pass. Here they are written into the weights after every
        optimizer step, and gradients are summed before it. The numbers are the same; checkpoints during
        training, tied weights, and code that reads weights need no change, and a step costs no more than a dense one.
    """

    name = "sharing"
    goes_on = True
    max_norm: float | None = 0.0

    def __init__(self, config: SharingConfig | None = None, *, calibration: Sequence[Batch] | None = None) -> None:
        self.config = SharingConfig() if config is None else config
        self.report: SharingReport | None = None
        self._given = calibration
        self._shared: dict[str, SharedWeight] = {}

    def prepare(self, trainer: Any) -> None:
        """Cluster the weights.

        Args:
            trainer: the trainer; its ``student`` is the model without wrappers.

        Raises:
            LmcompressError: If :func:`~lmcompress.clustering.planning.plan` or
                :func:`~lmcompress.clustering.kmeans.kmeans` refuses, a sensitivity has no data, or another method in
                the run cuts the model or changes single weights.
        """
        for other in trainer.methods:
            if other.changes_shapes or other.changes_values:
                raise LmcompressError(
                    f"{other.name} must be done in a stage before weights are shared, got it in one run: values are "
                    "shared by the matrices as they are"
                )
        student = trainer.student
        batches = self._given
        if self.config.sensitivity and batches is None:
            batches = calibration_rows(trainer, self.config.calibration_rows, 1, self.config.seed)
        self.attach(student, batches)

    def attach(self, model: nn.Module, batches: Iterable[Batch] | None = None) -> None:
        """The effect of :meth:`prepare` on the model, without a trainer.

        Args:
            model: not wrapped; its weights are modified in place.
            batches: for the sensitivity.

        Raises:
            LmcompressError: If :meth:`prepare` would refuse it.
        """
        self._planned, self._untouched = plan(model, self.config)
        found = _clusters(model, self._planned, self.config, batches)
        self._errors: dict[str, float] = {}
        for planned, clusters in zip(self._planned, found, strict=True):
            path, weight = planned.at.path, planned.at.weight
            before = weight.detach().clone()
            shared = SharedWeight(clusters).to(weight.device)
            shared.write(weight)
            self._shared[path] = shared
            self._errors[path] = relative_error(before, weight)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The codebooks, without weight decay."""
        codebooks = [shared.codebook for shared in self._shared.values() if len(shared.codebook)]
        if not codebooks:
            return []
        rate = self.config.codebook_learning_rate
        return [{"params": codebooks} if rate is None else {"params": codebooks, "lr": rate}]

    def modules(self) -> dict[str, nn.Module]:
        """Codebooks and indices, for checkpoints."""
        # names of submodules have no dots
        return {"shared": nn.ModuleDict({path.replace(".", "/"): shared for path, shared in self._shared.items()})}

    def finish(self) -> None:
        """Write the report; the weights already have their final values.

        Raises:
            LmcompressError: If something else has changed weights since the last step.
        """
        if self.report is not None:
            return
        for planned in self._planned:
            if not self._shared[planned.at.path].holds(planned.at.weight):
                raise LmcompressError(
                    f"{planned.at.path} no longer has its shared values, something has changed it: methods that cut or "
                    "quantize weights must be done in a separate stage"
                )
        self.report = self._reported(trained=True)

    def resume(self, trainer: Any) -> None:
        """After :meth:`finish`, go on with the same clusters.

        Args:
            trainer: unused.
        """
        self.report = None

    def before_optimizer_step(self) -> None:
        """Turn gradients of weights into those of their shared values.

        After clipping, which reads the model's own parameters, and before the hook that handles ours.
        """
        for planned in self._planned:
            self._shared[planned.at.path].gather(planned.at.weight)

    def after_optimizer_step(self) -> None:
        """Set weights to their shared values."""
        for planned in self._planned:
            self._shared[planned.at.path].write(planned.at.weight)

    def _reported(self, *, trained: bool) -> SharingReport:
        rows = [_row(planned, self._errors[planned.at.path]) for planned in self._planned]
        return SharingReport(self.config.model_dump(mode="json"), rows, dict(self._untouched), trained)


def share_weights(
    model: nn.Module | CompressedModel, config: SharingConfig | None = None, batches: Iterable[Batch] | None = None
) -> SharingReport:
    """Cluster the weights of each matrix, without training.

    Args:
        model: a ``PreTrainedModel``, a ``CompressedModel`` or any other module; its weights are modified in place.
        config: number of values for each matrix; default: Deep Compression's.
        batches: batches with labels, preferably of one row each, if the config asks for sensitivity.

    Returns:
        The resulting clusters.

    Raises:
        LmcompressError: If :class:`WeightSharing` refuses the config or the data; the model is then unchanged.
    """
    method = WeightSharing(config)
    inner = inner_model(unwrapped(model))
    method.attach(inner, None if batches is None else batches_for(inner, batches))
    return method._reported(trained=False)


def _clusters(
    model: nn.Module, planned: Sequence[Planned], config: SharingConfig, batches: Iterable[Batch] | None
) -> list[Clusters]:
    sensitivities: Sequence[Tensor | None] = [None] * len(planned)
    if config.sensitivity:
        if batches is None:
            raise LmcompressError("sensitivity must be measured on data, got none; pass batches with labels")
        sensitivities = fisher_diagonal(model, [one.at.weight for one in planned], batches)
    found = []
    for one, sensitivity in zip(planned, sensitivities, strict=True):
        try:
            clusters = kmeans(
                one.at.weight,
                one.clusters,
                initial=config.initial,
                weights=sensitivity,
                keep_zeros=config.keep_zeros,
                iterations=config.iterations,
                seed=config.seed,
            )
        except LmcompressError as error:
            raise LmcompressError(f"{one.at.path}: {error}") from error
        found.append(clusters)
    return found


def _row(planned: Planned, error: float) -> SharedMatrix:
    weight = planned.at.weight.detach()
    zeros = int((weight == 0).sum())
    values = len(weight.unique()) - int(zeros > 0)
    return SharedMatrix(
        path=planned.at.path,
        part=planned.at.part,
        weights=weight.numel(),
        zeros=zeros,
        clusters=values,
        bits=8 * weight.element_size(),
        error=error,
    )
