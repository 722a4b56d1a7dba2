"""Writing a checkpoint safely: to a temporary folder, reloaded, compared with the model in memory, then moved."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.checkpoint.travelling import registered_alone
from lmcompress.errors import EquivalenceError, LmcompressError
from lmcompress.families import head_logits, input_names, is_described, outline_of, with_decoder_inputs
from lmcompress.kernels.dispatch import using
from lmcompress.nn.quantized_attention import ATTENTION

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Equivalence:
    """The measurements of the round-trip check of a saved model.

    Attributes:
        max_error: max abs difference of outputs before and after.
        relative_error: that over the max abs output before.
        batches: number of batches compared.
        inputs: ``"given"`` where the caller gave batches, ``"random"`` where token ids were drawn.
        tensors: number of tensors that were compared bit by bit where the model was too large to be reloaded beside
            itself, and outputs are those of two blocks; 0 where the whole model was reloaded.
    """

    max_error: float
    relative_error: float
    batches: int
    inputs: str
    tensors: int = 0


TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Max abs difference of outputs allowed after reloading, relative to the max abs output, by dtype; else 1e-5."""


def tolerance_of(dtype: torch.dtype) -> float:
    """The difference allowed by default after reloading a model.

    Args:
        dtype: of its weights. Sums of few bits differ more where they are added in another order.

    Example:
        >>> tolerance_of(torch.float32)
        1e-05
    """
    return TOLERANCES.get(dtype, 1e-5)


def check_round_trip(
    model: PreTrainedModel,
    folder: Path,
    batches: Sequence[Batch],
    before: Sequence[Tensor],
    *,
    tolerance: float,
    inputs: str,
    format: str,
) -> Equivalence:
    """Reload a written checkpoint and refuse it if its outputs differ from those of the model in memory.

    One that carries its loader is reloaded by that loader as well, and compared with the reference kernel.

    Args:
        model: the model that was written.
        folder: folder it was written to.
        batches: batches to compare on.
        before: :func:`outputs_of` the model.
        tolerance: max abs difference of outputs allowed, relative to the max abs output.
        inputs: origin of the batches, for the result.
        format: format it was written in, for messages.

    Returns:
        The measured differences.

    Raises:
        EquivalenceError: If the reloaded model's outputs differ or are NaN.
    """
    reloaded = _reloaded(model, folder)
    measured = compared(outputs_of(reloaded, batches), before, tolerance, inputs, format)
    if format != "self_loading":
        return measured
    with registered_alone():
        alone = _reloaded(model, folder)
    # other kernels add in another order, after which a number between two codes goes to either
    with using(kernel="reference"):
        expected = outputs_of(reloaded, batches)
    carried = compared(outputs_of(alone, batches), expected, tolerance, inputs, format)
    return max(measured, carried, key=lambda one: one.max_error)


def _reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    attention = model.config._attn_implementation
    # the loader chooses that one by itself
    attention = None if attention == ATTENTION else attention
    reloaded = type(model).from_pretrained(folder, dtype=model.dtype, attn_implementation=attention)
    return reloaded.to(model.device)


def compared(
    after: Sequence[Tensor], before: Sequence[Tensor], tolerance: float, inputs: str, format: str
) -> Equivalence:
    """The differences between two models' outputs.

    Args:
        after: :func:`outputs_of` the model that was reloaded.
        before: those of the one in memory.
        tolerance: max abs difference allowed, relative to the max abs output.
        inputs: origin of the batches, for the result.
        format: format that was written, for messages.

    Raises:
        EquivalenceError: If they differ by more, in shape, or are NaN.
    """
    if [a.shape for a in after] != [b.shape for b in before]:
        raise EquivalenceError(
            f"the model reloaded from disk ({format}) returns shapes {[tuple(a.shape) for a in after]}, the "
            f"one in memory in {[tuple(b.shape) for b in before]}; nothing was written"
        )
    # max of a tensor: Python's would lose a NaN after a number
    error = float(torch.stack([(a - b).abs().max() for a, b in zip(after, before, strict=True)]).max())
    scale = float(torch.stack([b.abs().max() for b in before]).max())
    relative = error / scale if scale > 0 else error
    # written this way round so that NaN fails
    if not relative <= tolerance:
        raise EquivalenceError(
            f"the model reloaded from disk ({format}) differs from the one in memory by {error:.3g} "
            f"({relative:.3g} relative, allowed {tolerance:.3g}) on {len(before)} batches; nothing was written. "
            "If the model returns NaN, training diverged; otherwise please report this with the recipe."
        )
    return Equivalence(max_error=error, relative_error=relative, batches=len(before), inputs=inputs)


def outputs_of(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Tensor]:
    """The logits of a model, or its first output (the last hidden state), for each batch, in float32 on the CPU.

    Args:
        model: switched to evaluation mode and back.
        batches: model inputs; entries the model does not take (labels, teacher inputs) are ignored.

    Returns:
        One tensor per batch; padded positions are zero.
    """
    wanted = {"input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask"}
    wanted &= input_names(model)
    if is_described(model) and not outline_of(model).family.token_type_embeddings:
        wanted -= {"token_type_ids"}
    training = model.training
    # after mixed-precision training, accelerate leaves its autocast around forward; the saved model has none
    forward = getattr(model, "_original_forward", model)
    model.eval()
    outputs = []
    try:
        with torch.no_grad():
            for batch in batches:
                given = with_decoder_inputs(model, batch)
                inputs = {name: given[name].to(model.device) for name in wanted if name in given}
                answer = forward(**inputs)
                logits = head_logits(answer)
                first = answer[0] if logits is None else logits
                mask = given.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
                if mask is not None and first.dim() == 3 and first.shape[:2] == mask.shape:
                    first = first * mask.to(first).unsqueeze(-1)
                outputs.append(first.float().cpu())
    finally:
        model.train(training)
    return outputs


def random_batches(
    model: PreTrainedModel, *, count: int = 2, rows: int = 4, length: int = 32, seed: int = 0
) -> list[Batch]:
    """Batches of random token ids, the last one with padding on the right.

    Args:
        model: its vocabulary and number of positions bound the ids and the length.
        count: number of batches.
        rows: rows of each; one if the model cannot take more, for lack of a padding token.
        length: tokens of each row, at most half of the model's positions.
        seed: seed of the generator.

    Returns:
        Dictionaries with ``input_ids`` and ``attention_mask``, ``(rows, length)`` int64; for a model of multiple
        choice, ``(rows / 2, 2, length)``; for one with an encoder and a decoder, also ``decoder_input_ids`` and
        ``decoder_attention_mask``, ``(rows, length / 2)``.
    """
    generator = torch.Generator().manual_seed(seed)
    anatomy = outline_of(model)
    headless = model.get_output_embeddings() is None
    if (anatomy.family.causal or not is_described(model)) and headless and model.config.pad_token_id is None:
        rows = 1  # GPT-2 with a task head finds the last token by the padding and takes single rows only without it
    length = max(2, min(length, int(getattr(model.config, "max_position_embeddings", length)) // 2))
    batches: list[Batch] = []
    for index in range(count):
        mask = torch.ones(rows, length, dtype=torch.long)
        if index == count - 1:
            mask[1:, length // 2 :] = 0
        # id 1 is RoBERTa's padding, from which it counts positions
        ids = torch.randint(2, int(model.config.vocab_size), (rows, length), generator=generator)
        batch = {"input_ids": ids, "attention_mask": mask}
        if model.config.is_encoder_decoder:
            ids = torch.randint(2, int(model.config.vocab_size), (rows, length // 2), generator=generator)
            # shorter, and its padding begins elsewhere
            own = mask[:, length // 4 :][:, : length // 2]
            batch |= {"decoder_input_ids": ids, "decoder_attention_mask": own}
        batches.append(batch)
    if any(known.__name__.endswith("ForMultipleChoice") for known in type(model).__mro__):
        # a row is a choice of two
        return [{name: tensor.view(-1, min(rows, 2), length) for name, tensor in batch.items()} for batch in batches]
    return batches


@contextmanager
def replaced_folder(folder: Path, *, marker: str = "config.json") -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block succeeds and is deleted when it fails.

    Args:
        folder: may exist; it is replaced as a whole, and unchanged until then.
        marker: a file that an existing folder must hold, so that no other kind of folder is ever replaced.

    Yields:
        The temporary folder, on the same file system.

    Raises:
        LmcompressError: If ``folder`` is a file, or holds files but no ``marker``, or its location is not
            writable (a full disk, no permission).
    """
    folder = folder.resolve()
    if folder.is_file():
        raise LmcompressError(f"{folder} is a file; a checkpoint is a folder, name another path")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise LmcompressError(
            f"{folder} holds files but no {marker}, and would be replaced as a whole; name a new folder or an empty one"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise LmcompressError(f"cannot write to {folder.parent}: {error.strerror or error}") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if folder.exists():
            old = temporary.with_suffix(".old")
            os.replace(folder, old)
            try:
                os.replace(temporary, folder)
            except BaseException:
                os.replace(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_disk_error(error):
            raise LmcompressError(
                f"could not write {folder}: {error}. Nothing was changed there; free some space or name another path"
            ) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_disk_error(error: BaseException) -> bool:
    # safetensors reports a full disk as its own error type, with the system's message
    # transformers raises OSErrors without a number for problems unrelated to the disk
    return (isinstance(error, OSError) and error.errno is not None) or "No space left" in str(error)
