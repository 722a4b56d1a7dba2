"""F1 of entities, for labels of words in the IOB scheme."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmcompress.errors import LmcompressError
from lmcompress.evaluation.metrics import IGNORED_LABEL, Ragged

ENTITY_F1 = "entity_f1"
"""Name of the metric; it needs ``pip install "lmcompress[ner]"``."""


def is_iob(label_names: Sequence[str]) -> bool:
    """Whether labels mark entities: ``O``, and ``B-`` or ``I-`` with a type.

    Args:
        label_names: the classes.

    Example:
        >>> is_iob(("O", "B-person", "I-person")), is_iob(("NOUN", "VERB"))
        (True, False)
    """
    return "O" in label_names and len(label_names) > 1 and all(n == "O" or n[:2] in ("B-", "I-") for n in label_names)


def entity_f1(predictions: Ragged, labels: Ragged, label_names: Sequence[str]) -> float:
    """F1 of entities over all rows: an entity counts where its type and both its ends are right.

    An entity ends where a type ends or ``B-`` begins another; an ``I-`` without a ``B-`` begins one, as in the script
    of CoNLL-2000. Computed by nervaluate (strict), which is kept; the last release of seqeval, whose default counts the
    same, is of 2020.

    Args:
        predictions: one array of classes for each row.
        labels: same shapes; what is -100 is left out.
        label_names: the classes, in the IOB scheme.

    Returns:
        F1 in [0, 1]; 0 where there are no entities at all.

    Raises:
        LmcompressError: If nervaluate is not installed, the names are in another scheme, or rows differ in length.

    Reference:
        Tjong Kim Sang & De Meulder 2003, *Introduction to the CoNLL-2003 Shared Task*, section 2.
    """
    try:
        from nervaluate import Evaluator
    except ImportError as error:
        raise LmcompressError(f'{ENTITY_F1} needs nervaluate: pip install "lmcompress[ner]"') from error
    if not is_iob(label_names):
        raise LmcompressError(
            f"{ENTITY_F1} is of labels in the IOB scheme (O, B-type, I-type), got {', '.join(label_names[:8])}"
        )
    said, right = [], []
    for row, (given, truth) in enumerate(zip(predictions, labels, strict=True)):
        kept = np.asarray(truth) != IGNORED_LABEL
        if np.shape(given) != np.shape(truth):
            raise LmcompressError(f"row {row} must have a label for each prediction, got {len(truth)} and {len(given)}")
        said.append([label_names[label] for label in np.asarray(given)[kept]])
        right.append([label_names[label] for label in np.asarray(truth)[kept]])
    types = sorted({name[2:] for name in label_names if name != "O"})
    return float(Evaluator(right, said, tags=types, loader="list").evaluate()["overall"]["strict"].f1)
