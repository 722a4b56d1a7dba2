"""Does an exported classifier give the answers of the packed model, row by row?

The MiniLM teachers of ``benchmarks/teachers.py``, W8A8 by rounding to nearest, ranges of activations from 128 training
rows, exported to ONNX Runtime and OpenVINO; every validation row is answered by the packed model in torch and by the
export, in batches with padding.

    python benchmarks/export_answers.py --data ../shared/data --work runs
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import asked, glue_parser, write
from teachers import TASKS, train_teacher
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lmcompress.data import collator, load_task, tokenize
from lmcompress.export import export_model, load_exported
from lmcompress.quantization import ActivationScheme, QuantizationConfig, WeightScheme
from lmcompress.quantization.ptq import quantize

BATCH, CALIBRATION_ROWS = 32, 128
# ranges, runtime, precision of what is not quantized, and the share of equal answers that is asked for
WAYS: tuple[tuple[Any, Any, str | None, float], ...] = (
    ("static", "onnx", None, 0.997),
    ("dynamic", "onnx", None, 0.997),
    ("static", "openvino", "f32", 0.997),
    ("static", "openvino", "bf16", 0.992),
)
RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}


def scheme(ranges: Any) -> QuantizationConfig:
    """W8A8, a scale for each row."""
    weights = WeightScheme(quantizer="minmax", granularity="row")
    return QuantizationConfig(
        weights=weights, embeddings=weights, activations=ActivationScheme(range=ranges), attention=False
    )


def batches(rows: Any, collate: Any) -> list[dict[str, Tensor]]:
    """Padded batches, without labels."""
    made = [collate([rows[i] for i in range(k, min(k + BATCH, len(rows)))]) for k in range(0, len(rows), BATCH)]
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in made]


@torch.inference_mode()
def answers(model: Any, given: list[dict[str, Tensor]]) -> Tensor:
    """The logits of all rows."""
    return torch.cat([model(**batch).logits.float() for batch in given])


def task_rows(options: Any, task: str) -> list[dict[str, Any]]:
    """A row of results for each way."""
    teacher = options.work / "teachers" / task
    train_teacher(options.data, options.work / "teachers", task, quick=options.quick)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(teacher),
        AutoTokenizer.from_pretrained(teacher),
    )
    rows = tokenize(load_task(f"glue/{task}", data=options.data), tokenizer, max_length=64 if options.quick else 128)
    collate = collator(rows.task, tokenizer)
    seen = rows.validation.select(range(64)) if options.quick else rows.validation
    given, labels = batches(seen, collate), torch.tensor(seen["labels"])
    calibration = batches(rows.train.select(range(min(CALIBRATION_ROWS, len(rows.train)))), collate)
    packed = {ranges: copy.deepcopy(model).eval() for ranges in ("static", "dynamic")}
    for ranges, one in packed.items():
        quantize(one, scheme(ranges), calibration, progress=False)
    expected = {ranges: answers(one.eval(), given) for ranges, one in packed.items()}

    def accuracy(logits: Tensor) -> float:
        return 100 * float((logits.argmax(-1) == labels).float().mean())

    found = []
    for ranges, to, precision, target in WAYS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "exported"
            report = export_model(packed[ranges], folder, to=to, batches=calibration[:2], tokenizer=tokenizer)
            exported = load_exported(folder, threads=1, **({} if precision is None else {"precision": precision}))
            logits = answers(exported, given)
        same = int((logits.argmax(-1) == expected[ranges].argmax(-1)).sum())
        found.append(
            {
                "task": task, "ranges": ranges, "runtime": RUNTIMES[to], "rest": precision or "f32",
                "accuracy_dense": accuracy(answers(model.eval(), given)), "accuracy_packed": accuracy(expected[ranges]),
                "accuracy": accuracy(logits), "same": same, "of": len(labels), "target": target,
                "max_difference": float((logits - expected[ranges]).abs().max()),
                "integer_products": report.products.integer, "products": report.products.total,
            }
        )  # fmt: skip
        print(found[-1], flush=True)
    return found


def main() -> None:
    """Command line."""
    options = glue_parser(__doc__, TASKS, ("sst2",)).parse_args()
    if options.quick:
        options.work = options.work / "quick"
    torch.set_num_threads(1)
    rows = [row for task in options.tasks for row in task_rows(options, task)]
    wanted = [
        asked(
            f"same answers as the packed model, {row['task']}, {row['ranges']}, {row['runtime']}, {row['rest']} rest",
            f">= {100 * row['target']:.1f} %", 100 * row["same"] / row["of"], row["same"] / row["of"] >= row["target"],
        )
        for row in rows
    ]  # fmt: skip
    print(write("export_answers", rows, wanted, quick=options.quick))


if __name__ == "__main__":
    main()
