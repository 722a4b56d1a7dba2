"""Does a checkpoint answer as the model did? Every family, whole and cut, saved and loaded by the plain ``AutoModel``
classes.

Random weights at a width of 256; heads and neurons are cut differently in each block, and a block is dropped. What
is reported is the greatest difference of any output on two batches, one of them padded.

    python benchmarks/reload.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from common import asked, write
from transformers.utils import logging

from lmcompress import CompressedModel, anatomy_of
from lmcompress.checkpoint.cutting import keep_heads, keep_layers, keep_neurons
from lmcompress.checkpoint.saving import outputs_of, random_batches
from lmcompress.evaluation import size_on_disk

BERT_LIKE = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertForSequenceClassification", BERT_LIKE, "AutoModelForSequenceClassification"),
    "roberta": ("RobertaForSequenceClassification", BERT_LIKE, "AutoModelForSequenceClassification"),
    "electra": ("ElectraForSequenceClassification", BERT_LIKE, "AutoModelForSequenceClassification"),
    "distilbert": (
        "DistilBertForSequenceClassification",
        dict(dim=256, n_layers=4, n_heads=4, hidden_dim=1024),
        "AutoModelForSequenceClassification",
    ),
    "gpt2": ("GPT2LMHeadModel", dict(n_embd=256, n_layer=4, n_head=4), "AutoModelForCausalLM"),
}


def cut(model: Any) -> None:
    """Take heads, neurons and a block away, unevenly."""
    keep_layers(model, [0, 1, 3])
    for number, block in enumerate(anatomy_of(model).blocks):
        keep_heads(block, range(number, 4))
        keep_neurons(block, range(0, 1024, number + 2))


def measure(family: str, state: str, format: str) -> dict[str, Any]:
    """Save, load by both ``AutoModel`` classes, compare."""
    class_name, sizes, auto_name = FAMILIES[family]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes)).eval()
    if state == "cut":
        cut(model)
    batches = random_batches(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        CompressedModel(model).save_pretrained(folder, format=format)  # type: ignore[arg-type]
        differences = []
        for loader, reference in ((auto_name, model), ("AutoModel", model.base_model)):
            reloaded = getattr(transformers, loader).from_pretrained(folder)
            pairs = zip(outputs_of(reference, batches), outputs_of(reloaded, batches), strict=True)
            differences.append(max(float((a - b).abs().max()) for a, b in pairs))
        parameters = sum(p.numel() for p in model.parameters())
        return {
            "family": family, "state": state, "format": format, "parameters": parameters,
            "bytes": size_on_disk(folder).weights_bytes, "max_difference": max(differences),
        }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two families")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    families = list(FAMILIES)[-2:] if options.quick else list(FAMILIES)
    ways = (("whole", "native"), ("whole", "vanilla"), ("cut", "native"), ("cut", "self_loading"))
    rows = [measure(family, *way) for family in families for way in ways]
    worst = max(row["max_difference"] for row in rows)
    for row in rows:
        print(row)
    wanted = [asked("greatest difference of logits after reloading, all families", "0", worst, worst == 0)]
    print(write("reload", rows, wanted, quick=options.quick))


if __name__ == "__main__":
    main()
