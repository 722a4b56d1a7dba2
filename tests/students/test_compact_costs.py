"""compact.costs: operations are those that the modules do."""

import pytest
from families import FAMILIES, cut_to_nothing, cut_unevenly, make

from lmcompress import LmcompressError
from lmcompress.checkpoint.structure import structure_of
from lmcompress.families import anatomy_of
from lmcompress.pruning.structured.costs import FlopCost, ModelSizes
from lmcompress.students import by_width, factorize, factorize_embeddings, group, model_flops


@pytest.fixture(params=FAMILIES, ids=str)
def family(request):
    return request.param


@pytest.mark.parametrize("shape", [lambda m: m, cut_unevenly, cut_to_nothing], ids=["whole", "uneven", "hollow"])
def test_of_a_dense_model_they_are_what_pruning_says(family, shape):
    model = shape(make(family))
    cost = FlopCost(ModelSizes.of(model), batch_size=2, length=9)
    assert model_flops(model, batch_size=2, length=9) == cost.cost(structure_of(model))


def test_groups_divide_them_and_ranks_are_counted(family):
    attention = 2 * 9 * 9 * 2 * 16 * 3
    matrices = model_flops(make(family), length=9) - attention
    model = make(family)
    group(model, 4)
    assert model_flops(model, length=9) == attention + matrices // 4
    model = make(family)
    factorize(model, rank=2, parts=["ffn_in"])
    assert model_flops(make(family), length=9) - model_flops(model, length=9) == 3 * 2 * 9 * (16 * 24 - 2 * 40)
    if family.name != "electra-projected":
        factorize_embeddings(model, 3)
        assert model_flops(make(family), length=9) - model_flops(model, length=9) == (
            3 * 2 * 9 * (16 * 24 - 2 * 40) - 2 * 9 * 3 * 16
        )


@pytest.mark.parametrize("multiplier", [0.25, 0.5, 0.75, 1.0])
def test_a_width_multiplier_scales_all_widths_and_operations_by_its_square(family, multiplier):
    teacher = make(family)
    student = by_width(teacher, multiplier).model
    block = anatomy_of(student).blocks[0]
    assert block.num_heads == 4 * multiplier and block.ffn_width == 24 * multiplier and block.head_size == 4
    length = 1
    attention = [2 * 2 * b.num_heads * b.head_size * len(anatomy_of(m).blocks) * length**2
                 for m, b in ((student, block), (teacher, anatomy_of(teacher).blocks[0]))]  # fmt: skip
    ours, theirs = (model_flops(m, length=length) - a for m, a in zip((student, teacher), attention, strict=True))
    assert ours == theirs * multiplier**2


@pytest.mark.parametrize("multiplier", [0, -1, 1.5, float("nan")])
def test_a_multiplier_out_of_range_is_refused(multiplier):
    with pytest.raises(LmcompressError, match="width multiplier must be above 0 and at most 1, got"):
        by_width(make("bert"), multiplier)
