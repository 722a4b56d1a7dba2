"""Arguments for the tiny trainings of tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
