"""Class weights: rare classes count as much as frequent ones, in any trainer of lmcompress.

    python examples/class_weights.py

It runs offline, on a CPU, in less than a minute: a small BERT from scratch learns to tell questions about cards from
all others, which are 29 times as frequent, at 4 bits; in so few steps the plain loss only learns to say "other".
``compute_loss_func`` is the argument of Transformers' own ``Trainer``; terms of methods are added to it. In a recipe
the same is ``task: {class_weights: balanced}``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

from lmcompress.data import collator, load_task, tokenize, train_tokenizer
from lmcompress.evaluation import evaluate_classifier
from lmcompress.quantization import QuantizationConfig
from lmcompress.trainers import QuantizationTrainer


def weighted_loss(weights: Tensor) -> Callable[..., Tensor]:
    """A loss on labels in which every row counts by the weight of its class.

    Args:
        weights: ``(classes,)``; with a mean of 1 over the training rows the loss keeps its size.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        total = F.cross_entropy(outputs["logits"].float(), labels, weight=weights.to(labels.device), reduction="sum")
        # of the whole optimizer step, however many micro-batches it has
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def unbalanced_task() -> Any:
    """The rows of CLINC150 with two labels: five of its 150 intents are about cards."""
    source = load_task("embedded/clinc150")
    names = source.task.label_names or ()

    def relabelled(rows: Any) -> list[dict[str, str]]:
        pairs = zip(rows["text"], rows["intent"], strict=True)
        return [{"text": text, "label": "card" if "card" in names[y] else "other"} for text, y in pairs]

    return load_task("cards", data={"train": relabelled(source.train), "validation": relabelled(source.validation)})


def main() -> None:
    """The same training with and without weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160, help="Optimizer steps of each model.")
    parser.add_argument("--output", type=Path, default=Path("runs/class-weights"), help="Folder of the models.")
    options = parser.parse_args()
    data = unbalanced_task()
    tokenizer = train_tokenizer(data.train["text"], kind="wordpiece", vocab_size=2000)
    rows, collate = tokenize(data, tokenizer, max_length=24), collator(data.task, tokenizer)
    counts = torch.bincount(torch.tensor(data.train["label"]), minlength=data.task.num_labels)
    balanced = counts.sum() / (len(counts) * counts)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=32, num_labels=2, id2label=data.task.id2label, label2id=data.task.label2id,
    )  # fmt: skip
    table = Table("loss", "accuracy", "macro F1", title=f"{int(counts.max())} rows of one class, {int(counts.min())}")
    for name, loss in (("class weights", weighted_loss(balanced)), ("no weights", None)):
        set_seed(0)
        args = TrainingArguments(
            output_dir=str(options.output), max_steps=options.steps, learning_rate=1e-3, warmup_steps=40, seed=0,
            per_device_train_batch_size=32, save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = QuantizationTrainer(
            model=BertForSequenceClassification(config),
            args=args,
            train_dataset=rows.train,
            data_collator=collate,
            processing_class=tokenizer,
            compute_loss_func=loss,
            quantization=QuantizationConfig(weights={"bits": 4}, embeddings={"bits": 8}),
        )
        trainer.train()
        trainer.save_model(str(options.output / name.replace(" ", "-")))
        metrics = ("accuracy", "f1_macro")
        found = evaluate_classifier(trainer.model, rows.validation, collate, "classification", metrics, 64)
        table.add_row(name, f"{found['accuracy']:.3f}", f"{found['f1_macro']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
