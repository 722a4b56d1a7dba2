"""Does a pruned encoder get as much faster as it has fewer operations, is a latency target met, what does a step cost?

Random weights, and scores that are drawn: times do not depend on either, shapes are all that counts.

All are timed in one process, in rounds of random order, the dense encoder twice: what it differs from itself by is what
the machine does. CPU time of one thread, wall time of two; ratios are medians of pairs within rounds.

* Speed-up: the encoders of MiniLM's and BERT-base's shape, dense and cut; beside them the dense one in bfloat16.
  ``even``: all blocks alike; ``uneven``: heads and neurons go where their scores are least, down to none in a block.
  The FLOP ratio counts the matmuls of the blocks. ``nothing`` is an encoder without any head or neuron: what is left
  (residual connections, norms, Python) is what no pruning of heads and neurons can speed up, and the ceiling is the
  speed-up if everything else ran in proportion to its operations. A profile says where the time went.
* Compiled: MiniLM dense and cut in equal blocks, all by ``torch.compile`` with frozen weights, beside the same without.
  What is left of a narrow encoder are many small operations, which a compiler merges. Needs a C++ compiler.
* Latency targets: a table is measured, a shape chosen by it, cut, and timed beside the dense model.
* Step: a training step with gates and scores over the same step of plain ``Trainer``, on one thread; what schedules do
  between steps (choosing and masking, steering) is added by its mean.

    python benchmarks/pruning_speed.py
"""

from __future__ import annotations

import argparse
import copy
import shutil
import tempfile
import time
from typing import Any

import torch
from common import asked, write
from speeds import add_threads, on, timed_rows
from steps import StepByStep, overhead
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from trainer_overhead import arguments, make_batch, make_teacher
from transformers import BertConfig, BertForSequenceClassification, Trainer, set_seed
from transformers.utils import logging

from lmcompress.pruning import Part, Units, cut, full, masked_structure
from lmcompress.pruning.structured.config import GroupLasso, HardConcrete, Movement, PruningConfig
from lmcompress.pruning.structured.costs import FlopCost, ModelSizes
from lmcompress.pruning.structured.latency import measure_latency
from lmcompress.pruning.structured.ranking import select
from lmcompress.pruning.structured.targets import Target
from lmcompress.schedules import Gradual
from lmcompress.trainers import PruningTrainer

SHAPES = {
    "MiniLM": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "BERT-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
}
LENGTH, MULTIPLE_OF = 128, 16
PARTS: tuple[Part, ...] = ("heads", "neurons")
SPARSITIES = (0.5, 0.75, 0.9)
# batch size: what the speed-up must be of the FLOP ratio
ASKED = {32: 0.8, 1: 0.6}
# timed calls of each, by shape and batch size
REPEATS = {("MiniLM", 32): 15, ("MiniLM", 1): 60, ("BERT-base", 32): 5, ("BERT-base", 1): 25}
LATENCY_SHARES = (0.5, 0.33)
# parts of an encoder's time: names of the operations that begin like this
OPERATIONS = {
    "matmuls": ("aten::addmm", "aten::mm", "aten::bmm", "aten::linear"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "activation": ("aten::gelu",),
    "norms and residuals": ("aten::native_layer_norm", "aten::layer_norm", "aten::add"),
}

TARGET = Target(sparsity=0.5)
# the five families of CoFi: layers of both kinds, heads, neurons and hidden dimensions
COFI = ("heads", "neurons", "attention", "ffn", "hidden")
METHODS: dict[str, PruningConfig] = {
    "gradual, scores from training": PruningConfig(
        target=TARGET, schedule=Gradual(), criterion="fisher", scores="training"
    ),
    "hard_concrete": PruningConfig(target=TARGET, schedule=HardConcrete()),
    "hard_concrete, five families": PruningConfig(target=TARGET, schedule=HardConcrete(), parts=COFI),
    "movement": PruningConfig(target=TARGET, schedule=Movement()),
    "group_lasso": PruningConfig(target=TARGET, schedule=GroupLasso()),
}


class EncoderOnly(nn.Module):
    """The blocks of a BERT by themselves, on hidden states that are drawn once.

    It is called like the model, so that ``compare_latency`` can time it; of the ids only their number counts.

    Args:
        model: a BERT with any head.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config, self.encoder = model.config, model.base_model.encoder
        # of the last matrix and not of the config: other libraries cut it without saying so there
        self._width = self.encoder.layer[0].output.dense.out_features
        self._states: dict[tuple[int, ...], Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Hidden states after the last block.

        Args:
            input_ids: ``(batch, length)``.
            attention_mask: all 1, and so not looked at, as BERT itself does not pass on a mask of ones.
        """
        return self.encoder(self.states(input_ids))

    def states(self, input_ids: Tensor) -> Tensor:
        """What goes into the first block.

        Args:
            input_ids: ``(batch, length)``.

        Returns:
            ``(batch, length, width)``, the same each time.
        """
        shape = tuple(input_ids.shape)
        if shape not in self._states:
            drawn = torch.randn(*shape, self._width, generator=torch.Generator().manual_seed(0))
            self._states[shape] = drawn.to(self.device, next(self.parameters()).dtype)
        return self._states[shape]


def make_model(name: str, quick: bool) -> Any:
    """A random model: arithmetic costs the same whatever the weights."""
    set_seed(0)
    sizes = SHAPES[name] | ({"num_hidden_layers": 2} if quick else {})
    return BertForSequenceClassification(BertConfig(**sizes)).eval()


def drawn_scores(model: Any, seed: int = 0) -> Units:
    """Random scores, those of some blocks greater than those of others, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    units = full(model, PARTS, 0.0, torch.float32)

    def draw(zeros: Tensor) -> Tensor:
        factor = torch.randn((), generator=generator).exp()
        return factor * torch.rand(len(zeros), generator=generator)

    return units.map(draw)


def choose(model: Any, target: Target, kind: str, cost: Any = None) -> Units:
    """A mask that meets a target, in equal blocks or in unequal ones."""
    scores, sizes = drawn_scores(model), ModelSizes.of(model)
    if kind == "even":
        return select(scores, sizes, target, ranking="per_layer", multiple_of=MULTIPLE_OF, cost=cost)
    # heads with heads and neurons with neurons: drawn numbers say nothing of one against the other
    nothing_stays: dict[Part, int] = {"heads": 0, "neurons": 0}
    return select(
        scores, sizes, target,
        ranking="isomorphic", multiple_of=MULTIPLE_OF, keep_at_least=nothing_stays, cost=cost,
    )  # fmt: skip


def cut_copy(model: Any, mask: Units) -> Any:
    """A copy without what the mask takes away."""
    result = copy.deepcopy(model)
    cut(result, mask)
    return result


def speed(name: str, threads: int, quick: bool) -> list[dict[str, Any]]:
    """Encoders of one shape at all sparsities, beside the dense one."""
    dense = make_model(name, quick)
    sizes = ModelSizes.of(dense)
    encoders = {"dense": EncoderOnly(dense)}
    structures = {"dense": sizes.structure}
    about: dict[str, dict[str, Any]] = {"dense": {"kind": "dense", "sparsity": 0.0}}
    encoders["bf16"] = EncoderOnly(copy.deepcopy(dense).bfloat16())
    structures["bf16"], about["bf16"] = sizes.structure, {"kind": "bf16", "sparsity": 0.0}
    for kind in ("even", "uneven"):
        for sparsity in SPARSITIES:
            mask = choose(dense, Target(sparsity=sparsity), kind)
            key = f"{kind} {sparsity}"
            encoders[key] = EncoderOnly(cut_copy(dense, mask))
            structures[key], about[key] = masked_structure(sizes.structure, mask), {"kind": kind, "sparsity": sparsity}
    nothing = full(dense, PARTS, False)
    encoders["nothing"] = EncoderOnly(cut_copy(dense, nothing))
    structures["nothing"], about["nothing"] = (
        masked_structure(sizes.structure, nothing),
        {"kind": "nothing", "sparsity": 1.0},
    )
    rows = []
    for batch in ASKED:
        size = min(batch, 4) if quick else batch
        timed = timed_rows(
            {"model": name, "question": "speed-up", "asked_batch": batch, "length": LENGTH}, encoders, threads=threads,
            batch_sizes=(size,), sequence_length=LENGTH, warmup=2, repeats=3 if quick else REPEATS[name, batch],
        )  # fmt: skip
        cost = FlopCost(sizes, size, LENGTH)
        # shares of the dense time
        floor = next(1 / row["speedup"] for row in timed if row["method"] == "nothing")
        for row in timed:
            key = row["method"] if row["method"] in about else "dense"
            flops = cost.cost(structures[key])
            flop_ratio = cost.cost(sizes.structure) / flops if flops else None
            row |= {"timing": row["kind"], **about[key], "flop_ratio": flop_ratio}
            row["of_flop_ratio"] = row["speedup"] / flop_ratio if flop_ratio else None
            row["ceiling"] = 1 / (floor + (1 - floor) / flop_ratio) if flop_ratio else None
            row["shape"] = [[block.heads, block.ffn] for block in structures[key].blocks]
        rows += timed
        profiled = {key: encoders[key] for key in ("dense", *(f"even {sparsity}" for sparsity in SPARSITIES))}
        rows += [
            {"model": name, "question": "profile", "batch": size, **about[key], "ms": operations(encoder, size)}
            for key, encoder in profiled.items()
            if threads == 1
        ]
    return rows


@torch.inference_mode()
def operations(encoder: Any, batch: int) -> dict[str, float]:
    """Milliseconds of one call by kind of operation, as torch's profiler tells; it slows down what is small."""
    ids = torch.zeros(batch, LENGTH, dtype=torch.long)
    calls = 1 if batch > 1 else 10
    encoder(ids)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            encoder(ids)
    found = dict.fromkeys([*OPERATIONS, "other"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in OPERATIONS.items() if event.key.startswith(names)), "other")
        found[kind] += event.self_cpu_time_total / 1000 / calls
    return {kind: round(ms, 3) for kind, ms in found.items()}


class Compiled(nn.Module):
    """An encoder as ``torch.compile`` makes it, with weights that will not change any more.

    Args:
        encoder: that was called at the size it is to be compiled for.
    """

    def __init__(self, encoder: EncoderOnly) -> None:
        super().__init__()
        self.config, self.device = encoder.config, encoder.device
        self.encoder = encoder
        self._call = torch.compile(encoder.encoder, dynamic=False, options={"freezing": True})

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """As of :class:`EncoderOnly`."""
        return self._call(self.encoder.states(input_ids))


def compiled(name: str, threads: int, quick: bool) -> list[dict[str, Any]]:
    """Encoders of one shape, dense and cut in equal blocks, with ``torch.compile`` and without."""
    dense = make_model(name, quick)
    sizes, rows = ModelSizes.of(dense), []
    for batch in ASKED:
        size = min(batch, 4) if quick else batch
        torch.compiler.reset()
        encoders, about = {}, {}
        for sparsity in (0.0, *(SPARSITIES[-1:] if quick else SPARSITIES)):
            mask = choose(dense, Target(sparsity=sparsity), "even") if sparsity else full(dense, PARTS, True)
            eager = EncoderOnly(cut_copy(dense, mask) if sparsity else dense)
            flops = FlopCost(sizes, size, LENGTH).cost(masked_structure(sizes.structure, mask))
            merged = Compiled(eager)
            ids = torch.zeros(size, LENGTH, dtype=torch.long)
            with torch.inference_mode():
                torch.testing.assert_close(merged(ids)[0], eager(ids)[0], rtol=1e-4, atol=1e-4)
            for way, encoder in (("eager", eager), ("compiled", merged)):
                encoders[f"{way} {sparsity}"] = encoder
                about[f"{way} {sparsity}"] = {"kind": way, "sparsity": sparsity, "flops": flops}
        timed = timed_rows(
            {"model": name, "question": "compiled", "asked_batch": batch, "length": LENGTH}, encoders, threads=threads,
            batch_sizes=(size,), sequence_length=LENGTH, warmup=3, repeats=3 if quick else REPEATS[name, batch],
        )  # fmt: skip
        over_eager = {row["method"]: row["speedup"] for row in timed}
        for row in timed:
            mine = about.get(row["method"], about["eager 0.0"])
            flop_ratio = about["eager 0.0"]["flops"] / mine["flops"]
            row |= {"timing": row["kind"], "kind": mine["kind"], "sparsity": mine["sparsity"]}
            # compiled ones over the compiled dense one
            row["speedup_over_eager"], row["flop_ratio"] = row["speedup"], flop_ratio
            row["speedup"] /= over_eager[f"{mine['kind']} 0.0"]
            row["of_flop_ratio"] = row["speedup"] / flop_ratio
        rows += timed
    return rows


def latency_targets(name: str, threads: int, quick: bool) -> list[dict[str, Any]]:
    """Shapes chosen by a measured table, timed beside the dense model: whole models, as the table is of those."""
    dense = make_model(name, quick)
    sizes, rows = ModelSizes.of(dense), []
    for batch in ASKED:
        size = min(batch, 4) if quick else batch
        repeats = 3 if quick else (15 if batch > 1 else 40)
        started = time.perf_counter()
        table = measure_latency(
            dense, batch_size=size, length=LENGTH, repeats=repeats, points=2 if quick else 5, copies=2 if quick else 4
        )
        seconds = time.perf_counter() - started
        models, predicted = {"dense": dense}, {}
        for share in LATENCY_SHARES:
            mask = choose(dense, Target(latency_share=share), "uneven", table)
            structure = masked_structure(sizes.structure, mask)
            models[str(share)] = cut_copy(dense, mask)
            predicted[str(share)] = table.cost(structure) / table.cost(sizes.structure)
        timed = timed_rows(
            {"model": name, "question": "latency target", "asked_batch": batch, "length": LENGTH}, models,
            threads=threads, batch_sizes=(size,), sequence_length=LENGTH, repeats=2 * repeats, warmup=2,
        )  # fmt: skip
        for row in timed:
            if row["method"] in predicted:
                row |= {"target": float(row["method"]), "by_table": predicted[row["method"]]}
                row |= {"measured": 1 / row["speedup"], "table_seconds": round(seconds)}
        rows += timed
    return rows


def step_overhead(repeats: int) -> list[dict[str, Any]]:
    """Steps with pruning over steps without, on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder)
        batch = make_batch("bert", args.device)
        trainers = {"baseline": StepByStep(Trainer(make_teacher("bert"), args), batch)}
        for name, config in METHODS.items():
            trainers[name] = StepByStep(PruningTrainer(make_teacher("bert"), args, pruning=config), batch)
        return [{"question": "step", "model": "MiniLM", **row} for row in overhead(trainers, repeats, 1)]


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requested against measured numbers: the minimum over all shapes."""
    wanted = []
    pruned = [row for row in rows if row["question"] == "speed-up" and row["kind"] in ("even", "uneven")]
    places = {(row["threads"], batch, sparsity) for row in pruned for batch in ASKED for sparsity in SPARSITIES}
    for threads, batch, sparsity in sorted(places, key=lambda place: (place[0], -place[1], place[2])):
        found = [r for r in pruned if (r["threads"], r["asked_batch"], r["sparsity"]) == (threads, batch, sparsity)]
        worst, least = min(found, key=lambda row: row["of_flop_ratio"]), ASKED[batch]
        met, busy = worst["of_flop_ratio"] >= least, any(row["busy"] for row in found)
        where = f"{batch} × {LENGTH}, {on(threads)}, {sparsity:.0%}"
        name = f"{where} of the encoder cut: speed-up over FLOP ratio, least of all shapes"
        wanted.append(asked(name, f">= {least}", worst["of_flop_ratio"], met, busy=busy))
        if not met:
            name = f"{where}: the ceiling of that shape ({worst['model']}) over FLOP ratio"
            wanted.append(asked(name, "reported", worst["ceiling"] / worst["flop_ratio"], True))
    for row in rows:
        where = f"{row['model']}, {row.get('asked_batch')} × {LENGTH}, {on(row.get('threads', 1))}"
        if row["question"] == "compiled" and row["kind"] == "compiled" and row["sparsity"]:
            name, least = (
                f"{where}, {row['sparsity']:.0%}, all compiled: speed-up over FLOP ratio",
                ASKED[row["asked_batch"]],
            )
            met = row["of_flop_ratio"] >= least
            wanted.append(asked(name, f">= {least}", row["of_flop_ratio"], met, busy=row["busy"]))
        if row["question"] == "latency target" and "target" in row:
            off = row["measured"] / row["target"] - 1
            name = f"{where}, latency share {row['target']}: measured over target"
            wanted.append(asked(name, "within 5 %", f"{off:+.1%}", abs(off) <= 0.05, busy=row["busy"]))
        if row["question"] == "step" and row["kind"] == "other":
            name, met = f"step with {row['method']} over without", row["ratio"] <= 1.15
            wanted.append(asked(name, "<= 1.15", row["ratio"], met, busy=row["busy"]))
    return wanted


def finish(name: str, rows: list[dict[str, Any]], setting: dict[str, Any], quick: bool) -> None:
    """Print and write what came."""
    wanted = verdicts(rows)
    for line in rows + wanted:
        print(line)
    print(write(name, rows, wanted, quick=quick, setting=setting))


def main() -> None:
    """Command line."""
    questions = ("speed", "compiled", "latency", "step")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="for the speed-up")
    possible = [name for name in questions if name != "compiled" or shutil.which("c++")]
    parser.add_argument("--questions", nargs="+", choices=questions, default=possible, help=f"default: {possible}")
    parser.add_argument("--steps", type=int, default=40, help="training steps of each method")
    parser.add_argument("--quick", action="store_true", help="MiniLM with two layers, few small rounds, one thread")
    add_threads(parser)
    options = parser.parse_args()
    if "compiled" in options.questions and shutil.which("c++") is None:
        parser.error("torch.compile needs a C++ compiler and there is no c++; install one, or name other --questions")
    logging.set_verbosity_error()
    setting = {
        "shapes": SHAPES, "multiple_of": MULTIPLE_OF,
        "methods": {name: config.model_dump(mode="json", exclude_none=True) for name, config in METHODS.items()},
    }  # fmt: skip
    compiled_rows, rows = [], []
    for threads in options.threads[:1] if options.quick else options.threads:
        torch.set_num_threads(threads)
        if "compiled" in options.questions:
            compiled_rows += compiled("MiniLM", threads, options.quick)
        if "speed" in options.questions:
            for name in ["MiniLM"] if options.quick else options.models:
                rows += speed(name, threads, options.quick)
        if "latency" in options.questions:
            rows += latency_targets("MiniLM", threads, options.quick)
    if "step" in options.questions:
        rows += step_overhead(3 if options.quick else options.steps)
    if compiled_rows:
        finish("pruning_compiled", compiled_rows, setting, options.quick)
    if rows:
        finish("pruning_speed", rows, setting, options.quick)


if __name__ == "__main__":
    main()
