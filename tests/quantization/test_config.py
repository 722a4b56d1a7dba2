import pytest
from pydantic import ValidationError

from lmcompress.quantization import ActivationScheme, QuantizationConfig, Rule, WeightScheme


def test_the_default_is_the_papers_at_8_bits():
    config = QuantizationConfig()
    assert (config.weights.quantizer, config.weights.granularity) == ("dynamic_scaling", "tensor")
    assert config.embeddings.granularity == "row" and config.activations.range == "dynamic" and config.attention


def test_it_survives_json():
    config = QuantizationConfig(
        weights=WeightScheme(quantizer="twn", bits="ternary", granularity=16),
        rules=(Rule(modules="ffn_out", weights=WeightScheme(bits=4)), Rule(modules="h.0.*", weights=None)),
    )
    assert QuantizationConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightScheme(quantizer="lqs"), "did you mean 'lsq'"),
        (lambda: WeightScheme(quantizer="twn", bits=8), "'twn' has bits ternary, 2, got 8"),
        (lambda: WeightScheme(bits=5), "bits"),
        (lambda: WeightScheme(granularity=0), "granularity"),
        (lambda: WeightScheme(quantizer="percentile", percentile=0), "above 0 and at most 100"),
        (lambda: ActivationScheme(bits=2), "bits"),
        (lambda: ActivationScheme(clip=0), "clip"),
        (lambda: ActivationScheme(range="static", granularity="token"), "must go with range dynamic, got range static"),
        (lambda: ActivationScheme(range="learned", clip=2.5), "must go with range dynamic, got range learned"),
        (lambda: ActivationScheme(calibration="mse"), "must go with range static, got range dynamic"),
        (lambda: Rule(modules="head", weights=None, activations=ActivationScheme()), "modules it leaves dense"),
        (lambda: QuantizationConfig(wieghts=None), "wieghts"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


def test_auto_is_decided_by_which_side_of_zero_values_lie():
    assert ActivationScheme().resolved(one_sided=True).symmetric is False
    assert ActivationScheme().resolved(one_sided=False).symmetric is True
    assert ActivationScheme(symmetric=True).resolved(one_sided=True).symmetric is True


def test_learned_ranges_end_as_static_ones_with_all_codes():
    encoding = ActivationScheme(range="learned", symmetric=True).encoding()
    assert encoding.range == "static" and encoding.full
    assert not ActivationScheme(range="learned", symmetric=False).encoding().full
    assert ActivationScheme(clip=2.5).encoding().clip == 2.5
