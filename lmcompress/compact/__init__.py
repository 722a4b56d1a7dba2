"""Students: making a smaller model from a teacher."""

from lmcompress.compact.students import (
    NAMED_SHAPES,
    NamedShape,
    Student,
    by_layers,
    by_shape,
    choose_layers,
    named,
)

__all__ = ["NAMED_SHAPES", "NamedShape", "Student", "by_layers", "by_shape", "choose_layers", "named"]
