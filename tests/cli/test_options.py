"""Names that the help lists are those that there are, and every verb with a task takes the options of a task."""

from typing import get_args

import pytest
from test_application import COMMANDS

from lmcompress.cli import options
from lmcompress.entropy_coding import CODERS
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import ENTITY_F1, METRICS, SPAN_METRICS
from lmcompress.export.tasks import TASKS
from lmcompress.numerics.quantizers.registry import QUANTIZERS
from lmcompress.pruning.structured.config import DEFAULT_CRITERION, PruningConfig
from lmcompress.pruning.structured.registry import CRITERIA
from lmcompress.quantization.ptq import Method
from lmcompress.recipes.metrics import PERPLEXITIES
from lmcompress.recipes.schema import Stage


def _choices(model, field):
    return get_args(model.model_fields[field].annotation)


@pytest.mark.parametrize(
    ("listed", "there_are"),
    [
        (options.CRITERIA, CRITERIA),
        (options.PARTS, get_args(_choices(PruningConfig, "parts")[0])),
        (options.RANKINGS, _choices(PruningConfig, "ranking")),
        (options.REPAIRS, _choices(PruningConfig, "repair")),
        (options.LABELS, _choices(PruningConfig, "labels")),
        (options.ROUNDINGS, get_args(Method)),
        (options.FORMATS, _choices(Stage, "save")),
        (options.STORAGES, _choices(Stage, "storage")),
        (options.STORAGES, ["plain", *CODERS]),
        (options.EXPORT_TASKS, TASKS),
        (options.METRICS, {*METRICS, *SPAN_METRICS, ENTITY_F1, *PERPLEXITIES}),
    ],
)
def test_help_lists_the_names_that_there_are(listed, there_are):
    assert sorted(listed) == sorted(there_are)


def test_defaults_and_quantizers_of_the_help_exist():
    assert options.DEFAULT_CRITERION == DEFAULT_CRITERION
    assert set(options.QUANTIZERS) <= set(QUANTIZERS)


TASK_OPTIONS = {"--task", "--data", "--text-column", "--label-column", "--split", "--metric", "--limit", "--max-length"}


@pytest.mark.parametrize("verb", ["evaluate", "prune", "quantize", "sensitivity", "frontier"])
def test_verbs_with_a_task_take_its_options(verb):
    assert TASK_OPTIONS <= {name for param in COMMANDS[verb].params for name in param.opts}


def test_no_other_verb_has_rows_of_a_task():
    with_data = {name for name, command in COMMANDS.items() if any("--data" in p.opts for p in command.params)}
    assert with_data == {"evaluate", "prune", "quantize", "sensitivity", "frontier", "export"}


def test_shapes_are_read_from_words():
    from lmcompress.cli.values import shape_of

    assert shape_of("layers=6, heads=8/4/0").heads == (8, 4, 0)
    with pytest.raises(LmcompressError, match="--shape must look like layers=6"):
        shape_of("heads:3")
