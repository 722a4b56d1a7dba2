"""Half of a GPT-2, trained on WikiText-2 with its teacher and without, and the same shape from scratch.

The teacher is the 4-layer GPT-2 of ``--model`` (trained on WikiText-2). The student keeps its first and its last
layer, embeddings and head. Each student sees the same blocks in the same order for the same steps: on labels alone
(control), and on labels and the teacher's next-token distributions (distilled). Perplexity is of the test text in
blocks of 128 tokens, the length that the teacher was trained on.

    python benchmarks/distillation_lm.py --data ../shared/data --model ../shared/models/gpt2-wikitext2
"""

from __future__ import annotations

import argparse
import gzip
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import asked, once, write
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, TrainingArguments, set_seed

from lmcompress.data import pack_blocks
from lmcompress.distillation import Distillation, DistillationConfig, LiveTeacher
from lmcompress.evaluation import parameter_count, perplexity, size_on_disk
from lmcompress.model import CompressedModel
from lmcompress.students.layers import by_layers
from lmcompress.trainers import CompressionTrainer

BLOCK, BATCH, STEPS, LEARNING_RATE = 128, 16, 200, 1e-3
CONFIG = DistillationConfig(temperature=1.0, weight=1.0, label_weight=0.5)


def read(data: Path, split: str) -> str:
    """A split of WikiText-2, to the byte."""
    with gzip.open(data / "lm" / "wikitext-2" / f"{split}.txt.gz", "rt", encoding="utf8", newline="") as stream:
        return stream.read()


def train(options: argparse.Namespace, folder: Path, role: str, seed: int, blocks: Any, test: str) -> dict[str, Any]:
    """One student in one role: ``distilled``, ``control``, ``scratch``."""
    set_seed(seed)
    teacher = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    student = by_layers(teacher, 2, choose="uniform").model
    if role == "scratch":
        student = GPT2LMHeadModel(student.config)
    methods = [Distillation(CONFIG, LiveTeacher(teacher))] if role == "distilled" else []
    args = TrainingArguments(
        str(folder / "checkpoints"), learning_rate=LEARNING_RATE, per_device_train_batch_size=BATCH,
        max_steps=20 if options.quick else STEPS, warmup_steps=0.06, lr_scheduler_type="cosine", weight_decay=0.01,
        optim="adamw_torch_fused", bf16=True, seed=seed, save_strategy="no", logging_steps=50, report_to="none",
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = CompressionTrainer(student, args, methods=methods, train_dataset=blocks)
    start = time.time()
    trainer.train()
    trainer.finish()
    seconds = time.time() - start
    batches = [{"input_ids": torch.tensor(blocks[:4]["input_ids"])}]
    measured = CompressedModel(student).save_pretrained(folder / "model", tokenizer=tokenizer, batches=batches)
    result = perplexity(student.cpu(), tokenizer, test, max_length=BLOCK, progress=False)
    return {
        "steps": args.max_steps, "tokens": args.max_steps * BATCH * BLOCK,
        "token_perplexity": result.token_perplexity, "word_perplexity": result.word_perplexity,
        "parameters": parameter_count(student), "bytes": size_on_disk(folder / "model").weights_bytes,
        "seconds": round(seconds), "reload_error": measured.max_error,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lm/wikitext-2/*.txt.gz")
    parser.add_argument("--model", type=Path, required=True, help="the GPT-2 that teaches")
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="20 steps, and a short test text")
    options = parser.parse_args()
    # a quick run is not to be mistaken for a real one later
    work = options.work / ("quick" if options.quick else "") / "distillation_lm"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    blocks = pack_blocks([read(options.data, "train")[: 200_000 if options.quick else None]], tokenizer, BLOCK)
    test = read(options.data, "test")[: 20_000 if options.quick else None]
    teacher = AutoModelForCausalLM.from_pretrained(options.model).eval()
    dense = perplexity(teacher, tokenizer, test, max_length=BLOCK, progress=False)
    rows: list[dict[str, Any]] = [
        {
            "role": "teacher", "token_perplexity": dense.token_perplexity, "word_perplexity": dense.word_perplexity,
            "parameters": parameter_count(teacher), "bytes": size_on_disk(options.model).weights_bytes,
        }
    ]  # fmt: skip
    for seed in range(options.seeds):
        for role in ("distilled", "control", "scratch"):
            folder = work / f"{role}-{seed}"
            rows.append(
                once(folder, {"role": role, "seed": seed}, partial(train, options, folder, role, seed, blocks, test))
            )
    of = {role: [r["token_perplexity"] for r in rows if r["role"] == role] for role in ("distilled", "control")}
    ratio = sum(of["distilled"]) / sum(of["control"])
    wanted = [
        asked("perplexity with the teacher over without", "< 1", ratio, ratio < 1),
        asked(
            "greatest difference of logits after reloading",
            "0",
            e := max(r.get("reload_error", 0) for r in rows),
            e == 0,
        ),
    ]
    setting = {
        "block": BLOCK,
        "batch": BATCH,
        "steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "layers": "4 -> 2 (0, 3)",
    }
    for line in rows + wanted:
        print(line)
    print(
        write(
            "distillation_lm",
            rows,
            wanted,
            quick=options.quick,
            setting=setting | {"distillation": CONFIG.model_dump(mode="json")},
        )
    )


if __name__ == "__main__":
    main()
