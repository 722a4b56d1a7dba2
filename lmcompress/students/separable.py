"""Local mixing in place of attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.layers import mixing_place, record_layers
from lmcompress.errors import LmcompressError
from lmcompress.families import Block, anatomy_of, weight_view
from lmcompress.families.mixing import mix_locally
from lmcompress.families.refusal import refuse_unproven
from lmcompress.nn.separable import SeparableMixing, check_kernel
from lmcompress.students._choosing import Batch, block_numbers, check_ready, run
from lmcompress.students.report import Before, CompactReport


def separate(
    model: PreTrainedModel, blocks: Sequence[int], kernel: int, batches: Iterable[Batch], *, ridge: float = 1e-6
) -> CompactReport:
    r"""Replace some blocks' attention by local mixing: a convolution of its values along the sequence.

    Queries and keys are removed; value and output projections stay. Each channel's kernel and bias are the
    least-squares fit to the heads' output in this channel on the data:

    .. math:: \min_{w_c, b_c} \sum_t \big( z_{t,c} - b_c - \sum_j w_{c,j} v_{t+j-j_0,c} \big)^2

    over real tokens. Attention at fixed distances is retained, content-dependent attention is lost: train afterwards.
    Causal models get a kernel that ends at its own position.

    Args:
        model: modified in place once everything has been checked, including its config. On ``meta`` only shapes
            are, and ``batches`` are ignored.
        blocks: numbers of the blocks, counted from 0.
        kernel: number of positions in the kernel; odd, except for causal models.
        batches: model inputs to fit on.
        ridge: fraction of the mean square of the values that is added to the diagonal of the normal equations.

    Returns:
        The replacements; the errors are shares of the squared deviation of the heads' output from its mean.

    Raises:
        LmcompressError: If a block does not exist, has no heads, mixes already or has compact values, the kernel is
            even or as wide as the model, there are no data, or the model is packed, parametrized or shares its blocks.

    Reference:
        Howard et al., *MobileNets*, 2017, https://arxiv.org/abs/1704.04861, section 3.1; Jiang et al., *ConvBERT*,
        2020, https://arxiv.org/abs/2008.02496, which shows how much of attention is local.
    """
    check_ready(model)
    refuse_unproven(model, "compact")
    anatomy = anatomy_of(model)
    check_kernel(kernel, anatomy.causal)
    numbers = block_numbers(model, blocks)
    places = {index: mixing_place(model, index, kernel) for index in numbers}
    before = Before.of(model)
    for index, place in places.items():
        _take_values(anatomy.blocks[index], place)
    missed = {} if model.device.type == "meta" else _fitted(model, places, batches, ridge)
    changed, errors = {}, {}
    for index, place in places.items():
        block = anatomy.blocks[index]
        trainable = weight_view(block.get(block.value_part)).requires_grad
        path = f"{anatomy.path(index)}.{block.family.attention}"
        if index in missed:
            errors[path] = missed[index]
        mix_locally(block, place.requires_grad_(trainable))
        changed[path] = f"mixes {kernel} neighbours"
    record_layers(model)
    return before.report(model, changed, errors=errors)


def _fitted(
    model: PreTrainedModel, places: Mapping[int, SeparableMixing], batches: Iterable[Batch], ridge: float
) -> dict[int, float]:
    """Set the kernels; returns their errors, by block."""
    anatomy = anatomy_of(model)
    fits = {index: _Fit(place, _value_rows(anatomy.blocks[index])[1], ridge) for index, place in places.items()}
    reads, writes = {}, {}
    for index, fit in fits.items():
        block = anatomy.blocks[index]
        writes[block.get(block.value_part)] = fit.values
        reads[block.get("attention_out")] = fit.context
    run(model, batches, reads, writes)
    return {index: fit.solve() for index, fit in fits.items()}


def _value_rows(block: Block) -> tuple[str, Tensor]:
    """The projection that computes a block's values, and its row for each channel of the heads' output."""
    part, rows = block.rows("value")
    # several query heads may read one value
    return part, rows.view(block.num_heads, 1, block.head_size).expand(-1, block.queries, -1).flatten()


def _take_values(block: Block, place: SeparableMixing) -> None:
    part, rows = _value_rows(block)
    old, inner = block.get(part), place.pointwise
    rows = rows.to(weight_view(old).device)
    with torch.no_grad():
        weight_view(inner).copy_(weight_view(old)[rows])
        if isinstance(old.bias, Tensor):
            assert isinstance(inner.bias, Tensor)
            inner.bias.copy_(old.bias[rows])


class _Fit:
    """The normal equations of each channel's kernel and bias."""

    def __init__(self, place: SeparableMixing, rows: Tensor, ridge: float) -> None:
        self.place, self.rows, self.ridge = place, rows, ridge
        channels, taps = place.out_features, place.kernel + 1
        self._gram = torch.zeros(channels, taps, taps, dtype=torch.float64)
        self._target = torch.zeros(channels, taps, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)
        self._values: Tensor | None = None

    def values(self, x: Tensor, mask: Tensor) -> None:
        """Record the values in the projection's output."""
        self._values = x.reshape(*mask.shape, -1)[..., self.rows.to(x.device)]

    def context(self, x: Tensor, mask: Tensor) -> None:
        """Record the heads' output."""
        place, values = self.place, self._values
        if values is None:
            raise LmcompressError("attention must compute its values before its output, it did not")
        left = place.kernel - 1 if place.causal else place.kernel // 2
        shifted = (values * mask.unsqueeze(-1)).double().transpose(1, 2)
        shifted = nn.functional.pad(shifted, (left, 0 if place.causal else left))
        # (rows, channels, length, kernel), one channel at a time would be slow and all in float64 large: rows are few
        windows = shifted.unfold(-1, place.kernel, 1).transpose(1, 2)[mask]
        ones = windows.new_ones(*windows.shape[:-1], 1)
        design = torch.cat([windows, ones], dim=-1).transpose(0, 1)
        target = x.reshape(*mask.shape, -1)[mask].double().t()
        self._gram += (design.transpose(1, 2) @ design).cpu()
        self._target += torch.einsum("ctk,ct->ck", design, target).cpu()
        self._squares += target.square().sum(1).cpu()
        self._values = None

    def solve(self) -> float:
        """Set the kernels; returns their share of the squared deviation that is not explained."""
        gram, target, taps = self._gram, self._target, self.place.kernel
        tokens = gram[:, -1, -1]
        scale = gram.diagonal(dim1=1, dim2=2)[:, :taps].mean(1).clamp(min=1e-30)
        damping = torch.zeros_like(gram)
        damping.diagonal(dim1=1, dim2=2)[:, :taps] = (self.ridge * scale)[:, None]
        solution, failed = torch.linalg.solve_ex(gram + damping, target)
        if bool(failed.any()):
            raise LmcompressError(
                f"the kernels of {taps} neighbours must be fitted to inputs that tell them apart, got {int(tokens[0])} "
                f"tokens whose neighbours do not; take more rows, a smaller kernel, or a ridge above {self.ridge:g}"
            )
        # ||t - Xs||^2 = t't - 2 s'X't + s'X'Xs
        missed = self._squares - 2 * (solution * target).sum(1)
        missed += torch.einsum("ck,ckl,cl->c", solution, gram, solution)
        deviation = (self._squares - target[:, -1].square() / tokens).sum()
        with torch.no_grad():
            self.place.weight.copy_(solution[:, None, :taps])
            self.place.bias.copy_(solution[:, taps])
        return float(missed.sum().clamp(min=0) / deviation.clamp(min=1e-30))
