"""Arguments for the tiny trainings of tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments


def tiny_arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Batches of 8 on the CPU, silent, nothing saved, seeds fixed; ``changes`` over these."""
    values: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        seed=3,
        data_seed=3,
    )
    return TrainingArguments(**(values | changes))


def rows(count: int = 24, labels: bool = True) -> list[dict[str, torch.Tensor]]:
    """Rows of ten random tokens without padding, of the three classes of ``families.make`` in turn."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 64, (count, 10), generator=generator)
    return [
        {"input_ids": one, "attention_mask": torch.ones_like(one)} | ({"labels": torch.tensor(n % 3)} if labels else {})
        for n, one in enumerate(ids)
    ]
