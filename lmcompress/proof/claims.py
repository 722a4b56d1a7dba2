"""The claims: what must hold for every family, and how each is checked on a tiny model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from lmcompress.activations.capture import Capture, shape_of
from lmcompress.checkpoint.cutting import drop_heads, drop_neurons
from lmcompress.checkpoint.saving import outputs_of
from lmcompress.checkpoint.structure import structure_of
from lmcompress.distillation import DistillationConfig
from lmcompress.families import anatomy_of
from lmcompress.kernels.dispatch import using
from lmcompress.model import CompressedModel
from lmcompress.proof.tiny import tiny_inputs
from lmcompress.pruning import (
    PARTS,
    Gates,
    Part,
    Units,
    cut,
    full,
    least_squares_in_order,
    masked_structure,
    score,
)
from lmcompress.quantization import POST_TRAINING, ActivationScheme, QuantizationConfig, WeightScheme, quantize
from lmcompress.students import by_layers, by_width, factorize, group, share_layers
from lmcompress.trainers import CompressionTrainer, DistillationTrainer, QuantizationTrainer

TOLERANCE = 2e-5
"""Largest difference of outputs relative to their largest value, or to 1: that of sums in another order."""

QUANTIZED = 0.02
"""Largest squared error of outputs at 8 bits, relative to their squares: eight times what rounding leaves."""

_ROW = WeightScheme(quantizer="minmax", granularity="row")
_EIGHT = POST_TRAINING.model_copy(update={"weights": _ROW, "embeddings": _ROW})


class Failed(Exception):
    """A claim that does not hold; the message is the reason."""


@dataclass(frozen=True)
class Bench:
    """What a check works with.

    Attributes:
        make: gives the tiny model, the same one at every call.
        folder: an empty folder.
    """

    make: Callable[[], PreTrainedModel]
    folder: Path

    @cached_property
    def generates(self) -> bool:
        """Whether the model is a causal language model."""
        return anatomy_of(self.make()).predicts_next

    @cached_property
    def answers(self) -> bool:
        """Whether the model has an encoder and a decoder, whose labels are a sequence of their own."""
        return anatomy_of(self.make()).reads_encoder

    def batches(self, count: int = 4) -> list[dict[str, Tensor]]:
        """Calibration data.

        Args:
            count: number of batches, of four rows each.
        """
        model = self.make()
        return [tiny_inputs(model, rows=4, seed=seed) for seed in range(1, count + 1)]

    def rows(self, count: int = 8) -> list[dict[str, Tensor]]:
        """Training data: rows with labels.

        Args:
            count: number of rows.
        """
        model, rows = self.make(), []
        for seed in range(count):
            row = {name: tensor[0] for name, tensor in tiny_inputs(model, rows=1, seed=seed, padded=False).items()}
            row["labels"] = torch.tensor(seed % model.config.num_labels)
            if self.answers:
                row["labels"] = row.pop("decoder_input_ids")
                del row["decoder_attention_mask"]
            elif self.generates:
                row["labels"] = row["input_ids"].clone()
            rows.append(row)
        return rows


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        says: the claim in a clause.
        capability: the capability that a user knows, a column of the table.
        check: raises :class:`Failed` or any other error if it does not hold; may return what was measured.
        without: why the model has nothing that the claim is about, or None if it has.
    """

    says: str
    capability: str
    check: Callable[[Bench], str | None]
    without: Callable[[Bench], str | None] = lambda bench: None


def outputs(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Logits or the last hidden state, zero at padding.

    Args:
        model: the model.
        **inputs: for :func:`~lmcompress.proof.tiny.tiny_inputs`.
    """
    return outputs_of(model, [tiny_inputs(model, **inputs)])[0]


def same(one: Tensor, other: Tensor, what: str) -> None:
    """Refuse a difference that the order of sums does not explain.

    Args:
        one: a tensor.
        other: what it must be.
        what: the two, for the message.

    Raises:
        Failed: If they differ.
    """
    if one.shape != other.shape:
        raise Failed(f"{what} have shapes {tuple(one.shape)} and {tuple(other.shape)}")
    error, scale = float((one - other).abs().max()), max(1.0, float(other.abs().max()))
    # written this way round so that NaN fails
    if not error <= TOLERANCE * scale:
        raise Failed(f"{what} differ by {error:.2g}, where the largest is {scale:.2g}")


def uneven_mask(model: PreTrainedModel, parts: Collection[Part], seed: int = 3) -> Units:
    """A random mask that keeps some of everything, differently in each block.

    Args:
        model: the model.
        parts: the parts that lose units.
        seed: of the first draw.
    """
    seeds = iter(range(seed, seed + 1000))

    def some(ones: Tensor) -> Tensor:
        number, count = next(seeds), len(ones)
        drawn = torch.rand(count, generator=torch.Generator().manual_seed(number)) < 0.6
        drawn[number % count] = True
        if count > 1:
            drawn[(number + 1) % count] = False
        return drawn

    mask = full(model, parts).map(some)
    anatomy = anatomy_of(model)
    kept = anatomy.fixed_blocks + (anatomy.starts if anatomy.reads_encoder else ())
    if mask.layers is not None and kept:
        mask.layers[list(kept)] = True
        mask.layers[-1] = False
    return mask


def _reloads(model: PreTrainedModel, bench: Bench, name: str, **how: Any) -> Path:
    """Save a model: the round-trip check loads it and compares outputs, here on padded rows; gives the folder."""
    folder = bench.folder / name
    batches = [tiny_inputs(model)]
    CompressedModel(model).save_pretrained(folder, batches=batches, tolerance=TOLERANCE, **how)
    return folder


def _cut(parts: Sequence[Part], bench: Bench) -> None:
    model = bench.make()
    mask, width = uneven_mask(model, parts), anatomy_of(model).hidden_size
    foretold = masked_structure(structure_of(model), mask)
    with Gates(model, mask.parts()) as gates:
        gates.set(mask)
        expected = outputs(model)
    if mask.hidden is not None and model.base_model is model and model.get_output_embeddings() is None:
        expected = expected[..., mask.hidden]
    cut(model, mask)
    same(outputs(model), expected, "outputs of the cut model and of gates")
    # of the hidden size the config may say more after the cut than before
    shapes = [[(block.heads, block.ffn) for block in structure.blocks] for structure in (structure_of(model), foretold)]
    if shapes[0] != shapes[1] or anatomy_of(model).hidden_size != (foretold.hidden or width):
        raise Failed(f"the cut model has shapes {shapes[0]}, its mask foretells {shapes[1]}")
    _reloads(model, bench, "cut")


def _emptied(bench: Bench) -> None:
    model = bench.make()
    blocks = anatomy_of(model).blocks
    drop_heads(blocks[0])
    drop_neurons(blocks[1])
    _reloads(model, bench, "empty")


def _dense(bench: Bench) -> None:
    model = bench.make()
    reloaded = type(model).from_pretrained(_reloads(model, bench, "dense"))
    same(outputs(reloaded), outputs(model), "outputs of the reloaded model and its own")


def _stock(bench: Bench) -> None:
    model = bench.make()
    mask = full(model, ["neurons"]).map(lambda ones: torch.arange(len(ones)) < len(ones) // 2)
    cut(model, mask)
    plain = type(model).from_pretrained(_reloads(model, bench, "stock", format="vanilla"))
    if hasattr(plain.config, "quantization_config"):
        raise Failed("the stock checkpoint names lmcompress in its config")
    same(outputs(plain), outputs(model), "outputs of the stock checkpoint and of the cut model")


def _self_loading(bench: Bench) -> None:
    model = bench.make()
    cut(model, uneven_mask(model, _losable(bench, "heads", "neurons")))
    # the round-trip check runs the loader that travels with the checkpoint
    _reloads(model, bench, "own", format="self_loading")


def _hidden_features(bench: Bench) -> None:
    model = bench.make()
    anatomy = anatomy_of(model)
    count, batch = len(anatomy.block_list), tiny_inputs(model)
    wanted = [("hidden", layer) for layer in range(count + 1)] + [("output", count)]
    with Capture(model, wanted) as capture, torch.no_grad():
        answer = model(**batch, output_hidden_states=True)
        features = capture.take()
    own = list(_of_stacks(answer, "hidden_states"))
    if bench.answers:
        # the embeddings of the decoder are no layer, and the last one of the encoder may be after its norm
        start = anatomy.starts[1]
        del own[start : start + 2]
        own.insert(start, features["hidden", start])
    for layer in range(count):
        same(features["hidden", layer], own[layer], f"captured and own hidden states of layer {layer}")
    # Transformers gives the last one after the final norm, if there is one
    last = features["output", count] if anatomy.family.final_norm else features["hidden", count]
    same(last, own[count], "the captured and the own output of the last layer")


def _of_stacks(answer: Any, name: str) -> tuple[Tensor, ...]:
    """Hidden states or attentions of all layers, those of an encoder before those of its decoder."""
    if f"encoder_{name}" in answer:
        return (*answer[f"encoder_{name}"], *answer[f"decoder_{name}"])
    return tuple(answer[name])


def _attention_features(bench: Bench) -> None:
    model = bench.make()
    model.set_attn_implementation("eager")
    anatomy = anatomy_of(model)
    count, batch = len(anatomy.block_list), tiny_inputs(model)
    wanted = [("probabilities", layer) for layer in range(1, count + 1)] + [("queries", 1), ("keys", 1), ("values", 1)]
    with Capture(model, wanted) as capture, torch.no_grad():
        own = _of_stacks(model(**batch, output_attentions=True), "attentions")
        features = capture.take()
    for kind in ("queries", "keys", "values"):
        heads = shape_of(model, (kind, 1))[0]
        if features[kind, 1].shape[1] != heads:
            raise Failed(f"{heads} heads of {kind} are foretold, {features[kind, 1].shape[1]} are captured")
    masks = [batch["attention_mask"], batch.get("decoder_attention_mask", batch["attention_mask"])]
    for layer in range(1, count + 1):
        real = masks[bench.answers and layer > anatomy.starts[1]][:, None, :, None]
        same(
            features["probabilities", layer].float() * real,
            own[layer - 1].float() * real,
            f"captured and own attention of layer {layer}",
        )


def _error(model: PreTrainedModel, before: Tensor) -> float:
    error = float((outputs(model) - before).square().sum() / before.square().sum())
    if not error <= QUANTIZED:
        raise Failed(
            f"8 bits change the outputs by {error:.2g} of their squares; rounding leaves less than {QUANTIZED}"
        )
    return error


def _post_training(method: Any, bench: Bench) -> str:
    model = bench.make()
    before = outputs(model)
    quantize(model, _EIGHT, bench.batches(), method=method, progress=False)
    error = _error(model, before)
    _no_matrix_left(model)
    _reloads(model, bench, method)
    return f"error {error:.1g}"


def _no_matrix_left(model: PreTrainedModel) -> None:
    left = [path for block in anatomy_of(model).blocks for path in block.undescribed()]
    if left:
        raise Failed(f"matrices of blocks that are not described stay dense: {', '.join(dict.fromkeys(left))}")


def _after_pruning(bench: Bench) -> None:
    model = bench.make()
    cut(model, uneven_mask(model, _losable(bench, "heads", "neurons")))
    quantize(model, _EIGHT, bench.batches(), method="gptq", progress=False)
    _reloads(model, bench, "both", storage="zstd")


def _quantized_attention(bench: Bench) -> str:
    model = bench.make()
    before = outputs(model)
    config = _EIGHT.model_copy(update={"activations": ActivationScheme(range="static"), "attention": True})
    quantize(model, config, bench.batches(), progress=False)
    error = _error(model, before)
    _reloads(model, bench, "attention")
    return f"error {error:.1g}"


def _trained(trainer: CompressionTrainer) -> float:
    """The mean loss of the steps of a trainer, which prints nothing."""
    trainer.remove_callback(PrinterCallback)
    loss = float(trainer.train().training_loss)
    if not loss < float("inf"):
        raise Failed(f"the loss of two steps is {loss}")
    return loss


def _arguments(bench: Bench, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(bench.folder / "training"), per_device_train_batch_size=4, max_steps=2, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no", **settings,
    )  # fmt: skip


def _distillation(bench: Bench) -> str:
    model = bench.make()
    teacher = copy.deepcopy(model)
    cut(model, uneven_mask(model, _losable(bench, "heads", "neurons")))
    last = len(anatomy_of(model).block_list)
    matches: list[Any] = [{"student": last, "teacher": last, "loss": "hidden_mse"}]
    trainer = DistillationTrainer(
        model,
        _arguments(bench),
        train_dataset=bench.rows(),
        teacher=teacher,
        distillation=DistillationConfig(matches=matches),
    )
    return f"loss {_trained(trainer):.2g}"


def _attention_distillation(bench: Bench) -> None:
    model = bench.make()
    last = len(anatomy_of(model).block_list)
    matches: list[Any] = [
        {"student": 1, "teacher": 1, "loss": "attention_mse_mean", "on": "probabilities"},
        {"student": last, "teacher": last, "loss": "minilmv2_value", "options": {"relation_heads": 2}},
    ]
    config = DistillationConfig(matches=matches, weight=0.0, label_weight=0.0)
    trainer = DistillationTrainer(
        model, _arguments(bench, learning_rate=0.0), train_dataset=bench.rows(), teacher=copy.deepcopy(model),
        distillation=config,
    )  # fmt: skip
    if not abs(loss := _trained(trainer)) < 1e-6:
        raise Failed(f"at the teacher, the losses on attention must be zero; they are {loss:.2g}")


def _quantization_aware(bench: Bench) -> None:
    model = bench.make()
    config = QuantizationConfig(
        weights=WeightScheme(quantizer="lsq", bits=4, granularity="row"),
        activations=ActivationScheme(bits=8),
        attention=False,
    )
    trainer = QuantizationTrainer(
        model,
        _arguments(bench),
        train_dataset=bench.rows(),
        quantization=config,
        auto_finish=False,
    )
    _trained(trainer)
    with using(kernel="reference"):
        fake = outputs(trainer.model.eval())
        trainer.finish()
        packed = outputs(trainer.model.eval())
        same(packed, fake, "outputs of the packed and of the fake-quantized model")
    _reloads(trainer.model, bench, "packed")


_CRITERIA: tuple[tuple[str, tuple[Part, ...]], ...] = (
    ("l2", ("heads", "neurons", "hidden")),
    ("fisher", ("heads", "neurons", "hidden")),
    ("taylor_weights", ("heads", "neurons")),
    ("wanda", ("heads", "neurons")),
    ("block_influence", ("layers",)),
    ("mean_activation", ("neurons", "hidden")),
)


def _scores(bench: Bench) -> None:
    model, batches = bench.make(), []
    for batch in bench.batches(2):
        labels = batch["input_ids"].clone() if bench.generates else torch.arange(4) % model.config.num_labels
        labels = batch["decoder_input_ids"].clone() if bench.answers else labels
        batches.append(batch | {"labels": labels})
    for criterion, parts in _CRITERIA:
        wanted = _losable(bench, *parts)
        for part, _, scores in score(model, criterion, wanted, batches).items() if wanted else ():
            if not bool(torch.isfinite(scores).all()):
                raise Failed(f"scores of {part} by {criterion} are not finite")


def _repair(bench: Bench) -> None:
    model = bench.make()
    mask = uneven_mask(model, _losable(bench, "heads", "neurons"))
    for row in least_squares_in_order(model, mask, bench.batches()):
        if not row.error_after < row.error_before:
            raise Failed(
                f"the error of {row.part} in block {row.block} is {row.error_after:.2g} with repair, "
                f"{row.error_before:.2g} without"
            )
    cut(model, mask)
    _reloads(model, bench, "repaired")


def _students(bench: Bench) -> None:
    teacher = bench.make()
    fewer = by_layers(teacher, [0, 2, 3, 5] if bench.answers else [0, 2]).model
    _reloads(fewer, bench, "fewer")
    # a student of another width is cut from one stack of blocks
    if not bench.answers and _losable(bench, "heads", "hidden") == ["heads", "hidden"]:
        narrower = by_width(bench.make(), 0.5).model
        _reloads(narrower, bench, "half")


def _compact(bench: Bench) -> None:
    for name, make in (("factorize", partial(factorize, rank=4)), ("group", partial(group, groups=2))):
        model = bench.make()
        make(model)
        _reloads(model, bench, name)


def _shared(bench: Bench) -> None:
    model = bench.make()
    share_layers(model)
    _reloads(model, bench, "shared")


def _generation(bench: Bench) -> None:
    model = bench.make()
    cut(model, uneven_mask(model, _losable(bench, "heads", "neurons", "layers")))
    settings = model.generation_config
    settings.pad_token_id, settings.eos_token_id, settings.forced_eos_token_id = 1, None, None
    settings.forced_bos_token_id = None
    batch = {name: value for name, value in tiny_inputs(model, rows=1, padded=False).items() if "decoder" not in name}
    with_cache, without = (
        model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    if not torch.equal(with_cache, without):
        raise Failed(f"with a cache it generates {with_cache.tolist()}, without {without.tolist()}")


def _losable(bench: Bench, *parts: Part) -> list[Part]:
    """Those parts that the family may lose."""
    refused = anatomy_of(bench.make()).family.refused
    return [part for part in parts if part not in refused]


def _no_generation(bench: Bench) -> str | None:
    return None if bench.generates or bench.answers else "not a language model that generates"


def _together(bench: Bench) -> None:
    _cut(_losable(bench, *PARTS), bench)


CLAIMS: dict[str, Claim] = {
    "dense": Claim("saved = reloaded", "loading", _dense),
    "heads": Claim("heads: gated = cut = reloaded", "heads", partial(_cut, ["heads"])),
    "neurons": Claim("neurons: gated = cut = reloaded", "neurons", partial(_cut, ["neurons"])),
    "attention": Claim("attention: gated = cut = reloaded", "sub-layers", partial(_cut, ["attention"])),
    "ffn": Claim("feed-forward networks: gated = cut = reloaded", "sub-layers", partial(_cut, ["ffn"])),
    "layers": Claim("blocks: gated = cut = reloaded", "layers", partial(_cut, ["layers"])),
    "hidden": Claim("the residual stream: gated = cut = reloaded", "hidden", partial(_cut, ["hidden"])),
    "together": Claim("all parts at once: gated = cut = reloaded", "pruning", _together),
    "emptied": Claim("no heads, no neurons: cut = reloaded", "sub-layers", _emptied),
    "scores": Claim("criteria give finite scores", "pruning", _scores),
    "repair": Claim("least squares brings the outputs of each sub-layer nearer", "pruning", _repair),
    "stock": Claim("half of the neurons: a stock checkpoint", "stock form", _stock),
    "self_loading": Claim("the loader that travels computes the same", "self-loading", _self_loading),
    "hidden_features": Claim("captured hidden states are the model's own", "distillation", _hidden_features),
    "distillation": Claim("two steps with logits and hidden states", "distillation", _distillation),
    "attention_features": Claim("captured attention is the model's own", "attention", _attention_features),
    "attention_distillation": Claim(
        "losses on attention are zero at the teacher", "attention", _attention_distillation
    ),
    "rtn": Claim("8 bits: packed = reloaded, near the model", "quantization", partial(_post_training, "rtn")),
    "gptq": Claim("GPTQ: packed = reloaded, near the model", "quantization", partial(_post_training, "gptq")),
    "awq": Claim("AWQ: packed = reloaded, near the model", "quantization", partial(_post_training, "awq")),
    "both": Claim("pruned, packed and coded = reloaded", "quantization", _after_pruning),
    "quantized_attention": Claim("scores in 8 bits: packed = reloaded", "quantized attention", _quantized_attention),
    "training": Claim("fake-quantized = packed = reloaded", "quantization", _quantization_aware),
    "students": Claim(
        "students of fewer blocks, and of half the width where that can be cut, reload",
        "students",
        _students,
    ),
    "compact": Claim("low-rank and grouped layers reload", "compact layers", _compact),
    "shared": Claim("blocks that share one set of weights reload", "shared blocks", _shared),
    "generation": Claim("with a cache = without", "generation", _generation, _no_generation),
}
"""The claims by name."""


def capabilities() -> dict[str, tuple[str, ...]]:
    """The names of the claims that make up each capability, in the order of the table's columns."""
    found: dict[str, list[str]] = {}
    for name, claim in CLAIMS.items():
        found.setdefault(claim.capability, []).append(name)
    return {capability: tuple(names) for capability, names in found.items()}
