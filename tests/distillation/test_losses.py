import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import expit, rel_entr, softmax

from lmcompress.distillation.losses import LOGIT_LOSSES, loss_for
from lmcompress.distillation.losses.distributions import js_divergence, kl_divergence, reverse_kl, soft_cross_entropy
from lmcompress.distillation.losses.outputs import binary_kl, logit_mse, probability_shift, regression_mse
from lmcompress.errors import LmcompressError

FUNCTIONS = [loss.function for loss in LOGIT_LOSSES.values()]
ZERO_AT_TEACHER = [f for f in FUNCTIONS if f is not soft_cross_entropy]
OF_DISTRIBUTIONS = [kl_divergence, soft_cross_entropy, reverse_kl, js_divergence]
each_loss = pytest.mark.parametrize("loss", FUNCTIONS, ids=LOGIT_LOSSES)


def logits(*shape, seed=0, dtype=torch.float32):
    return 2 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("loss", ZERO_AT_TEACHER, ids=lambda f: f.__name__)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_losses_are_zero_at_the_teacher_and_positive_elsewhere(loss, temperature, dtype):
    teacher, student = logits(3, 5, 11, dtype=dtype)
    zeros = loss(teacher, teacher, temperature=temperature)
    torch.testing.assert_close(zeros, torch.zeros(3, 5), atol=1e-5, rtol=0)
    assert (loss(student, teacher, temperature=temperature) > 0).all()


@each_loss
def test_losses_give_one_float32_per_row_with_gradient_to_the_student_only(loss):
    student, teacher = logits(2, 3, 4, dtype=torch.bfloat16)
    student.requires_grad_()
    teacher.requires_grad_()
    result = loss(student, teacher, temperature=2.0)
    assert result.shape == (2, 3) and result.dtype == torch.float32
    result.sum().backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert teacher.grad is None


@each_loss
def test_rows_are_independent_so_that_sums_do_not_depend_on_the_batch(loss):
    student, teacher = logits(4, 6)
    rows = torch.stack([loss(s, t, temperature=3.0) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(loss(student, teacher, temperature=3.0), rows)


@given(st.integers(0, 10_000), st.sampled_from([0.5, 1.0, 3.0, 8.0]))
@settings(max_examples=20, deadline=None)
def test_divergences_agree_with_scipy(seed, temperature):
    student, teacher = logits(2, 7, seed=seed)
    q = softmax(student.double().numpy() / temperature, axis=-1)
    p = softmax(teacher.double().numpy() / temperature, axis=-1)
    options = {"temperature": temperature, "scale_by_temperature": False}
    expected = {
        kl_divergence: rel_entr(p, q).sum(-1),
        reverse_kl: rel_entr(q, p).sum(-1),
        js_divergence: jensenshannon(p, q, axis=-1) ** 2,
        soft_cross_entropy: rel_entr(p, q).sum(-1) - (p * torch.from_numpy(p).log().numpy()).sum(-1),
    }
    for loss, value in expected.items():
        torch.testing.assert_close(
            loss(student, teacher, **options), torch.from_numpy(value).float(), atol=2e-6, rtol=1e-4
        )
    q, p = expit(student.double().numpy() / temperature), expit(teacher.double().numpy() / temperature)
    bernoulli = (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean(-1)
    torch.testing.assert_close(
        binary_kl(student, teacher, **options), torch.from_numpy(bernoulli).float(), atol=2e-6, rtol=1e-4
    )


@given(st.floats(0.05, 0.95), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_generalised_js_agrees_with_its_definition_and_is_bounded(beta, seed):
    student, teacher = logits(3, 5, seed=seed)
    q, p = softmax(student.double().numpy(), axis=-1), softmax(teacher.double().numpy(), axis=-1)
    m = beta * p + (1 - beta) * q
    expected = beta * rel_entr(p, m).sum(-1) + (1 - beta) * rel_entr(q, m).sum(-1)
    value = js_divergence(student, teacher, beta=beta)
    torch.testing.assert_close(value, torch.from_numpy(expected).float(), atol=2e-6, rtol=1e-4)
    assert (value <= 0.6932).all()


@pytest.mark.parametrize("beta, limit", [(1e-3, kl_divergence), (1 - 1e-3, reverse_kl)], ids=["forward", "reverse"])
def test_js_over_its_share_tends_to_the_two_kls(beta, limit):
    student, teacher = logits(3, 5) / 2
    share = min(beta, 1 - beta)
    torch.testing.assert_close(
        js_divergence(student, teacher, beta=beta) / share, limit(student, teacher), rtol=0.02, atol=1e-3
    )


def test_cross_entropy_has_the_gradient_of_the_kl():
    student, teacher = logits(3, 5)
    gradients = []
    for loss in (kl_divergence, soft_cross_entropy):
        leaf = student.clone().requires_grad_()
        loss(leaf, teacher, temperature=2.0).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("loss", [kl_divergence, reverse_kl], ids=lambda f: f.__name__)
def test_at_high_temperature_the_kls_become_half_the_mse_of_centred_logits(loss):
    student, teacher = logits(4, 6)
    centred = [z - z.mean(-1, keepdim=True) for z in (student, teacher)]
    # doubles would not help: the losses are float32 by contract
    torch.testing.assert_close(loss(student, teacher, temperature=200.0), logit_mse(*centred) / 2, rtol=0.05, atol=1e-2)


@pytest.mark.parametrize("loss", [*OF_DISTRIBUTIONS, binary_kl], ids=lambda f: f.__name__)
def test_the_factor_keeps_gradients_at_one_scale_as_the_temperature_rises(loss):
    def norm(temperature, scale):
        student, teacher = logits(4, 6)
        student.requires_grad_()
        loss(student, teacher, temperature=temperature, scale_by_temperature=scale).sum().backward()
        return student.grad.norm()

    assert norm(40.0, True) / norm(20.0, True) == pytest.approx(1, rel=0.1)
    assert norm(40.0, False) / norm(20.0, False) == pytest.approx(1 / 4, rel=0.1)


@each_loss
@pytest.mark.parametrize("scale", [True, False])
def test_a_temperature_per_row_is_that_row_at_that_temperature(loss, scale):
    student, teacher = logits(2, 3, 4)
    temperatures = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.5]])
    together = loss(student, teacher, temperature=temperatures, scale_by_temperature=scale)
    alone = [
        loss(student[i, j], teacher[i, j], temperature=float(temperatures[i, j]), scale_by_temperature=scale)
        for i in range(2)
        for j in range(3)
    ]
    torch.testing.assert_close(together, torch.stack(alone).view(2, 3))


@each_loss
def test_a_temperature_of_no_dimensions_is_a_number(loss):
    student, teacher = logits(2, 4)
    torch.testing.assert_close(
        loss(student, teacher, temperature=torch.tensor(2.0)), loss(student, teacher, temperature=2.0)
    )


def test_scaled_logit_mse_is_the_plain_one_and_unscaled_falls_with_the_temperature():
    student, teacher = logits(2, 4)
    plain = (student - teacher).square().mean(-1)
    torch.testing.assert_close(logit_mse(student, teacher, temperature=8.0), plain)
    torch.testing.assert_close(logit_mse(student, teacher, temperature=8.0, scale_by_temperature=False), plain / 64)


def test_regression_does_not_feel_the_temperature():
    student, teacher = logits(3, 1)
    for scale in (True, False):
        torch.testing.assert_close(
            regression_mse(student, teacher, temperature=8.0, scale_by_temperature=scale),
            (student - teacher).square().squeeze(-1),
        )


@pytest.mark.parametrize("loss", [*OF_DISTRIBUTIONS, binary_kl], ids=lambda f: f.__name__)
def test_extreme_logits_stay_finite(loss):
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = loss(student, -student.detach())
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [loss.function for loss in LOGIT_LOSSES.values() if not loss.across])
def test_losses_refuse_two_vocabularies(loss):
    with pytest.raises(LmcompressError, match=r"got \(2, 11\) and \(2, 12\).*different vocabularies or numbers of"):
        loss(torch.zeros(2, 11), torch.zeros(2, 12))


@each_loss
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_losses_refuse_temperatures_that_are_not_positive(loss, temperature):
    with pytest.raises(LmcompressError, match="temperature must be > 0"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=temperature)
    with pytest.raises(LmcompressError, match="temperature must be > 0"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=torch.tensor([1.0, temperature]))


@each_loss
def test_losses_refuse_temperatures_of_another_shape(loss):
    with pytest.raises(LmcompressError, match=r"one per row, of shape \(2,\), got \(3,\)"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=torch.ones(3))


@pytest.mark.parametrize("loss", OF_DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_losses_of_distributions_refuse_a_single_logit(loss):
    with pytest.raises(LmcompressError, match="gradient would be exactly zero.*regression_mse"):
        loss(torch.zeros(2, 1), torch.zeros(2, 1))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1])
def test_js_refuses_the_ends(beta):
    with pytest.raises(LmcompressError, match="beta must be between 0 and 1"):
        js_divergence(torch.zeros(2, 3), torch.zeros(2, 3), beta=beta)


@pytest.mark.parametrize(
    "problem_type, default",
    [
        ("single_label_classification", kl_divergence),
        ("token_classification", kl_divergence),
        ("causal_lm", kl_divergence),
        ("multi_label_classification", binary_kl),
        ("regression", regression_mse),
    ],
)
def test_each_problem_type_has_its_default(problem_type, default):
    assert loss_for(problem_type).function is default


def test_the_loss_asked_for_is_given_where_it_fits():
    assert loss_for("causal_lm", "reverse_kl").function is reverse_kl
    assert loss_for("multi_label_classification", "mse").function is logit_mse
    assert loss_for("regression", "mse").function is regression_mse


@pytest.mark.parametrize("name", ["kl", "ce", "reverse_kl", "jsd", "binary_kl"])
def test_a_regression_head_never_gets_a_loss_of_distributions(name):
    with pytest.raises(LmcompressError, match=f"{name}.*does not fit.*exactly zero.*Use regression_mse"):
        loss_for("regression", name)


def test_a_multi_label_head_never_gets_a_softmax():
    with pytest.raises(LmcompressError, match="labels are independent.*Use binary_kl or mse"):
        loss_for("multi_label_classification", "kl")


@pytest.mark.parametrize("name", ["binary_kl", "regression_mse"])
def test_a_classifier_never_gets_a_loss_of_independent_outputs(name):
    with pytest.raises(LmcompressError, match="alternatives of one softmax"):
        loss_for("single_label_classification", name)


def test_misspelt_names_get_the_nearest():
    with pytest.raises(LmcompressError, match="unknown logit loss 'reverse-kl'; did you mean 'reverse_kl'"):
        loss_for("causal_lm", "reverse-kl")
    with pytest.raises(LmcompressError, match="unknown problem type 'causal'.*Valid are: causal_lm"):
        loss_for("causal")


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_probability_shift_makes_the_teacher_right_and_keeps_its_logits(seed):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(3, 4, 5, generator=generator)
    labels = torch.randint(0, 5, (3, 4), generator=generator)
    before = teacher.clone()
    shifted = probability_shift(teacher, labels)
    assert torch.equal(shifted.argmax(-1), labels)
    assert torch.equal(shifted.sort(-1).values, teacher.sort(-1).values)
    right = teacher.argmax(-1) == labels
    assert torch.equal(shifted[right], teacher[right])
    # one swap: three of five logits stay at their place
    assert ((shifted != teacher).sum(-1)[~right] == 2).all()
    assert torch.equal(teacher, before)


def test_probability_shift_leaves_ignored_rows_alone():
    teacher, _ = logits(2, 4, 5, dtype=torch.bfloat16)
    labels = torch.tensor([[-100, 1, 2, -100], [0, -100, 4, 3]])
    shifted = probability_shift(teacher, labels)
    assert shifted.dtype == torch.bfloat16
    assert torch.equal(shifted[labels == -100], teacher[labels == -100])
    assert torch.equal(shifted.argmax(-1)[labels != -100], labels[labels != -100])


def test_probability_shift_honours_another_ignore_index():
    teacher = torch.tensor([[3.0, 1.0]])
    assert torch.equal(probability_shift(teacher, torch.tensor([1]), ignore_index=1), teacher)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0.5, 1.0]), "integer class labels, got torch.float32"),
        (torch.tensor([0, 1, 2]), r"shape \(2,\), got \(3,\)"),
        (torch.tensor([0, 7]), r"in \[0, 3\) or -100, got 7"),
    ],
    ids=["float", "shape", "range"],
)
def test_probability_shift_refuses(labels, message):
    with pytest.raises(LmcompressError, match=message):
        probability_shift(torch.zeros(2, 3), labels)
