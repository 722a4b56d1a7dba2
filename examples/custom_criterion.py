"""A pruning criterion of your own: by its name in a recipe, and as an object in Python.

    python examples/custom_criterion.py

It runs offline, on a CPU, in less than a minute: a small BERT from scratch learns some intents of CLINC150 in a few
hundred steps, and a part of its heads and neurons is pruned without training, by this criterion and by two built-in
ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lmcompress.data import collator, load_task, tokenize
from lmcompress.evaluation import evaluate_classifier
from lmcompress.pruning import Criterion, PruningConfig, prune
from lmcompress.recipes import parse_recipe, run

SPARSITY = 0.4


def sum_of_roots(group: Tensor) -> Tensor:
    """Sum of the square roots of the absolute weights of each head or neuron: many small weights count more than in L1.

    Args:
        group: ``(units, n)``, all weights that belong to a unit.

    Returns:
        ``(units,)``; a unit with a greater score stays longer.
    """
    return group.abs().sqrt().sum(dim=1)


# its name in messages, what it needs (the weights: no data), which parts it scores, and the function
roots = Criterion("roots", "weights", ("heads", "neurons"), sum_of_roots)

RECIPE = f"""\
name: custom-criterion
model: {{family: bert, hidden_size: 64, layers: 2, num_heads: 4, positions: 32,
        tokenizer: {{kind: wordpiece, vocab_size: 2000}}}}
task: {{name: embedded/clinc150, max_length: 24}}
stages:
  - name: dense
    training: {{max_steps: 400, learning_rate: 3.0e-3, warmup_steps: 40, save_strategy: "no"}}
  - name: pruned
    start: dense
    pruning: {{target: {{sparsity: {SPARSITY}}}, criterion: "custom_criterion:roots"}}
    training: {{max_steps: 0}}
evaluation: {{latency_batches: []}}
"""


def by_name(output: Path, steps: int, console: Console) -> dict[str, float]:
    """Accuracy of the dense model of the recipe and of the one that it prunes.

    Args:
        output: folder of the run.
        steps: optimizer steps of the dense model.
        console: where lines go.
    """
    recipe = parse_recipe(RECIPE, [f"stages.dense.training.max_steps={steps}"])
    report = run(recipe, output, overwrite=True, console=console).report
    return {row["name"]: row["metrics"]["validation"]["accuracy"] for row in report["rows"]}


def by_object(folder: Path, criterion: Criterion | str) -> float:
    """Accuracy of the dense model pruned by a criterion.

    Args:
        folder: of the dense model.
        criterion: an object, or the name of a built-in one.
    """
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    data, tokenizer = load_task("embedded/clinc150"), AutoTokenizer.from_pretrained(folder)
    prune(model, PruningConfig(target={"sparsity": SPARSITY}, criterion=criterion))
    rows, collate = tokenize(data, tokenizer, max_length=24), collator(data.task, tokenizer)
    return evaluate_classifier(model, rows.validation, collate, data.task.kind.value, ("accuracy",), 64)["accuracy"]


def main() -> None:
    """Both ways, and what they come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="Optimizer steps of the dense model.")
    parser.add_argument("--output", type=Path, default=Path("runs/custom-criterion"), help="Folder of the run.")
    options = parser.parse_args()
    # a recipe finds modules where Python does, and in the current folder
    sys.path.insert(0, str(Path(__file__).parent))
    console = Console()
    found = by_name(options.output, options.steps, console)
    table = Table(title=f"{SPARSITY:.0%} of the blocks' parameters pruned without training")
    for title in ("criterion", "accuracy"):
        table.add_column(title)
    table.add_row("none: dense", f"{found['dense']:.3f}")
    table.add_row("custom_criterion:roots, in a recipe", f"{found['pruned']:.3f}")
    table.add_row("roots, an object", f"{by_object(options.output / 'dense', roots):.3f}")
    for name in ("l1", "l2", "random"):
        table.add_row(name, f"{by_object(options.output / 'dense', name):.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
