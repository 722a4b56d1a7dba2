"""Compress a causal language model: fewer layers, low-bit weights, or both, taught by the model as it was.

In the manner of Transformers' own ``run_clm.py``: every field of ``TrainingArguments`` is an option.

    python examples/run_clm.py --model_name_or_path gpt2 --task_name my_texts/ --output_dir runs/gpt2-w2 \\
        --bits 2 --max_steps 1000 --learning_rate 1e-4
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments

from lmcompress import CompressedModel
from lmcompress.data import collator, load_task, tokenize
from lmcompress.distillation import Distillation, DistillationConfig, quantgpt
from lmcompress.evaluation import perplexity, size_on_disk
from lmcompress.method import Method
from lmcompress.quantization import Quantization, QuantizationConfig
from lmcompress.students import by_layers
from lmcompress.trainers import CompressionTrainer


@dataclass
class DataArguments:
    """What is read."""

    task_name: str = field(
        default="embedded/inaugural",
        metadata={"help": "A folder or file of texts, a Hub data set, or embedded/inaugural."},
    )
    block_size: int = field(default=256, metadata={"help": "Tokens of a training row; texts are packed into them."})
    limit: int | None = field(default=None, metadata={"help": "At most n texts of each split, to try things out."})


@dataclass
class ModelArguments:
    """What is compressed, and how."""

    model_name_or_path: str = field(metadata={"help": "A causal language model; it is also the teacher."})
    layers: int | None = field(default=None, metadata={"help": "Blocks of the student; default: all."})
    bits: int | None = field(default=None, metadata={"help": "Bit-width of the weights: 8, 4, 3 or 2."})


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train the student; returns perplexities and file sizes of teacher and student, the latter reloaded."""
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses(arguments)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    teacher = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    data = load_task(data_args.task_name, limit=data_args.limit)
    rows = tokenize(data, tokenizer, max_length=data_args.block_size)

    student = by_layers(teacher, model_args.layers or teacher.config.num_hidden_layers).model
    methods: list[Method] = []
    if model_args.bits is None:
        taught = DistillationConfig(temperature=2.0)
    else:
        methods.append(Quantization(QuantizationConfig(weights={"bits": model_args.bits})))
        # QuantGPT: logits and the contrast of tokens
        taught = quantgpt()
    methods.append(Distillation(taught, teacher))
    trainer = CompressionTrainer(
        student,
        args,
        methods=methods,
        train_dataset=rows.train,
        eval_dataset=rows.validation,
        data_collator=collator(rows.task, tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()

    folders = {"teacher": f"{args.output_dir}/teacher", "student": f"{args.output_dir}/model"}
    CompressedModel(copy.deepcopy(teacher)).save_pretrained(folders["teacher"], tokenizer=tokenizer)
    CompressedModel(student).save_pretrained(folders["student"], tokenizer=tokenizer)
    text = "\n".join(data.validation[data.task.text_columns[0]])
    found: dict[str, float] = {}
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        found[f"{name}_perplexity"] = perplexity(model, tokenizer, text).token_perplexity
        found[f"{name}_bytes"] = size_on_disk(folder).weights_bytes
    return found


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:,.2f}")
