"""Weight clustering as a method of the trainer: codebooks of the matrices are what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmcompress.clustering.config import SharingConfig
from lmcompress.clustering.kmeans import Clusters, kmeans, look_up, sum_by_cluster
from lmcompress.clustering.planning import Planned, plan
from lmcompress.clustering.report import SharedMatrix, SharingReport
from lmcompress.clustering.sensitivity import fisher_diagonal
from lmcompress.errors import LmcompressError
from lmcompress.method import StepCallback, SteppedMethod, calibration_rows
from lmcompress.model import CompressedModel
from lmcompress.numerics.errors import relative_error

Batch = Mapping[str, Tensor]


class SharedWeight(nn.Module):
    """The few values of one matrix, and which of them each weight has.

    Attributes:
        codebook: ``(clusters,)``, float32 or wider: the values beside zero, which are trained.
        indices: of the matrix's shape as it is stored, as in :class:`~lmcompress.clustering.kmeans.Clusters`.
        zero: whether index 0 stands for a zero that stays.

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
        """Give every weight the value of its cluster.

        Args:
            weight: as it is stored; changed in place.
        """
        weight.copy_(look_up(self.codebook, self.indices, zero=self.zero))

    @torch.no_grad()
    def holds(self, weight: Tensor) -> bool:
        """Whether every weight has the value of its cluster.

        Args:
            weight: as it is stored.
        """
        return torch.equal(weight, look_up(self.codebook, self.indices, zero=self.zero).to(weight.dtype))

    @torch.no_grad()
    def gather(self, weight: Tensor) -> None:
        """Turn the gradient of the weights into that of the codebook.

        Args:
            weight: whose gradient is taken away.
        """
        if weight.grad is None:
            return
        sums = sum_by_cluster(weight.grad, self.indices, clusters=len(self.codebook), zero=self.zero)
        self.codebook.grad = sums.to(self.codebook.dtype)
        weight.grad = None


class WeightSharing(SteppedMethod):
    """Clusters the weights of each matrix (weight sharing), and trains the codebook.

    When training begins every matrix is clustered. From then on weights only change with the value that they share: the
    gradient of a value is the sum of the gradients of its weights, and which weights belong to it stays as it is.
    Weights that are 0 stay so. The rest of the model (biases, norms, other matrices) is trained as ever.

    The model remains an ordinary one all the time, with few different numbers in its matrices; entropy-coded storage
    finds them by itself.

    Args:
        config: how many values which matrix has; default: Deep Compression's.
        calibration: batches with labels, best of one row each, for the sensitivity; default: rows of the training data.

    Attributes:
        report: what was done; after :meth:`finish`.
        max_norm: gradients are clipped as those of the weights, before they are summed, and not once more.

    Note:
        Deep Compression looks values up in every forward pass. Here they are written into the weights after every
        optimizer step, and gradients are summed before it. The numbers are the same; checkpoints in the middle of
        training, tied weights, and whatever reads a weight need nothing, and a step costs no more than a dense one.
    """

    name = "sharing"
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
                :func:`~lmcompress.clustering.kmeans.kmeans` refuses, a sensitivity has no data, another method in the
                run cuts the model or changes single weights, or a best checkpoint is to be loaded at the end.
        """
        if trainer.args.load_best_model_at_end:
            raise LmcompressError(
                "load_best_model_at_end must be false with shared weights: the weights of an earlier checkpoint do not "
                "have the values of the last. Compare checkpoints after the run, or train for fewer steps"
            )
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
        trainer.add_callback(StepCallback(self))

    def attach(self, model: nn.Module, batches: Iterable[Batch] | None = None) -> None:
        """What :meth:`prepare` does to the model, without a trainer.

        Args:
            model: not wrapped; its weights are changed in place.
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
        """The codebooks; without weight decay."""
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
        """Say what was done; the weights are what they shall be.

        Raises:
            LmcompressError: If something else has changed weights since the last step.
        """
        if self.report is not None:
            return
        for planned in self._planned:
            if not self._shared[planned.at.path].holds(planned.at.weight):
                raise LmcompressError(
                    f"{planned.at.path} must be what its weights share, something has changed it: what removes or "
                    "quantizes weights must be done in a stage of its own"
                )
        self.report = self._reported(trained=True)

    def before_optimizer_step(self) -> None:
        """Gradients of weights become those of the values they share.

        After clipping, which looks at the model's own parameters, and before the hook that cares for ours.
        """
        for planned in self._planned:
            self._shared[planned.at.path].gather(planned.at.weight)

    def after_optimizer_step(self) -> None:
        """Weights become the values they share."""
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
        model: a ``PreTrainedModel``, a ``CompressedModel`` or any other module; its weights are changed in place.
        config: how many values which matrix has; default: Deep Compression's.
        batches: with labels, best of one row each, where the config asks for sensitivity.

    Returns:
        What was done.

    Raises:
        LmcompressError: If :class:`WeightSharing` refuses the config or the data; the model is then unchanged.
    """
    method = WeightSharing(config)
    method.attach(model.model if isinstance(model, CompressedModel) else model, batches)
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
