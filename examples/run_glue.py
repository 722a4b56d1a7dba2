"""Fine-tune a classifier on a GLUE task or one of your own, and distil, prune and quantize it in one run.

In the manner of Transformers' own ``run_glue.py``: every field of ``TrainingArguments`` is an option.

    python examples/run_glue.py --model_name_or_path bert-base-uncased --task_name glue/sst2 --output_dir runs/sst2 \\
        --layers 6 --sparsity 0.5 --bits 8 --num_train_epochs 3 --learning_rate 5e-5

Without a network: ``--data FOLDER`` that holds ``glue/<task>/``, or ``--task_name rows.csv`` with columns of your own.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field

from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, TrainingArguments

from lmcompress import CompressedModel
from lmcompress.data import collator, load_task, tokenize
from lmcompress.distillation import Distillation, DistillationConfig
from lmcompress.evaluation import compute_metrics, predictions_from_logits
from lmcompress.method import Method
from lmcompress.pruning import Gradual, PruningConfig, StructuredPruning, Target
from lmcompress.quantization import Quantization, QuantizationConfig
from lmcompress.students import by_layers
from lmcompress.trainers import CompressionTrainer


@dataclass
class DataArguments:
    """What is learned."""

    task_name: str = field(metadata={"help": "glue/sst2 and its sisters, embedded/clinc150, a folder or a file."})
    data: str | None = field(default=None, metadata={"help": "Folder that holds glue/<task>/, instead of the Hub."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a row; longer texts are truncated."})
    limit: int | None = field(default=None, metadata={"help": "At most n rows of each split, to try things out."})


@dataclass
class ModelArguments:
    """What is compressed, and how."""

    model_name_or_path: str = field(metadata={"help": "A pretrained model, or one that is fine-tuned already."})
    teacher_epochs: float = field(default=3.0, metadata={"help": "Epochs of the teacher; 0: it is fine-tuned already."})
    layers: int | None = field(default=None, metadata={"help": "Blocks of the student; default: all."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature of the teacher's logits."})
    sparsity: float | None = field(default=None, metadata={"help": "Share of the blocks' parameters to prune."})
    bits: int | None = field(default=None, metadata={"help": "Bit-width of the weights: 8, 4, 3 or 2."})


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train the teacher and its student; returns the student's metrics after it was saved and reloaded."""
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses(arguments)
    data = load_task(data_args.task_name, data=data_args.data, limit=data_args.limit)
    task = data.task
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    rows = tokenize(data, tokenizer, max_length=data_args.max_length)
    labels = {"num_labels": task.num_labels, "problem_type": task.problem_type}
    if task.label_names:
        labels |= {"id2label": task.id2label, "label2id": task.label2id}
    teacher = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path, **labels)

    def metrics(prediction):
        said = predictions_from_logits(prediction.predictions, task.kind.value)
        return compute_metrics(task.metrics, said, prediction.label_ids)

    def trainer(model, methods: list[Method], **changed):
        own = copy.deepcopy(args)
        for name, value in changed.items():
            setattr(own, name, value)
        return CompressionTrainer(
            model,
            own,
            methods=methods,
            train_dataset=rows.train,
            eval_dataset=rows.validation,
            data_collator=collator(task, tokenizer),
            processing_class=tokenizer,
            compute_metrics=metrics,
        )

    if model_args.teacher_epochs:
        fine_tuning = trainer(teacher, [], num_train_epochs=model_args.teacher_epochs, save_strategy="no")
        fine_tuning.train()
        print("teacher:", fine_tuning.evaluate())

    student = by_layers(teacher, model_args.layers or teacher.config.num_hidden_layers).model
    methods: list[Method] = []
    if model_args.sparsity is not None:
        # half of the run prunes, the other half recovers; shapes are settled before the scales of quantization are
        target = Target(sparsity=model_args.sparsity)
        methods.append(StructuredPruning(PruningConfig(target=target, schedule=Gradual(end=0.5))))
    if model_args.bits is not None:
        methods.append(Quantization(QuantizationConfig(weights={"bits": model_args.bits})))
    methods.append(Distillation(DistillationConfig(temperature=model_args.temperature), teacher))
    compressing = trainer(student, methods)
    compressing.train()

    folder = f"{args.output_dir}/model"
    CompressedModel(student).save_pretrained(folder, tokenizer=tokenizer)
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder)
    return trainer(reloaded, []).evaluate()


if __name__ == "__main__":
    print("student, reloaded:", main())
    sys.exit(0)
