import numpy as np
import pytest
import torch

from lmcompress.errors import LmcompressError
from lmcompress.evaluation import evaluate_classifier, predict

LENGTHS = [3, 9, 1, 5, 9, 2, 7]


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if isinstance(rows[0].get("labels"), list):
        padded = [row["labels"] + [-100] * (width - len(row["labels"])) for row in rows]
        return {**batch, "labels": torch.tensor(padded)}
    if "labels" in rows[0]:
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}
    return batch


def rows(tokens=False, lengths=LENGTHS):
    generator = np.random.default_rng(0)
    ids = [generator.integers(1, 50, length).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [i % 3 for i in row] if tokens else n % 3} for n, row in enumerate(ids)]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_logits_are_those_of_each_row_alone_in_the_order_of_the_rows(make_classifier, batch_size):
    model = make_classifier()
    data = rows()
    logits, labels = predict(model, data, collate, batch_size)
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in data])
    assert logits.shape == (7, 3) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, alone.numpy(), rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [row["labels"] for row in data]


def test_token_logits_are_ragged_without_padding(make_classifier):
    model = make_classifier(tokens=True)
    data = rows(tokens=True)
    logits, labels = predict(model, data, collate, 3)
    assert [row.shape for row in logits] == [(length, 3) for length in LENGTHS]
    assert [row.tolist() for row in labels] == [row["labels"] for row in data]
    with torch.no_grad():
        alone = model(torch.tensor([data[3]["input_ids"]])).logits[0]
    np.testing.assert_allclose(logits[3], alone.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [False, True], ids=["rows", "tokens"])
def test_accuracy_against_the_models_own_answers_is_1(make_classifier, tokens):
    model = make_classifier(tokens=tokens)
    data = rows(tokens)
    logits, _ = predict(model, data, collate)
    for row, answer in zip(data, logits, strict=True):
        row["labels"] = answer.argmax(-1).tolist()
    kind = "token_classification" if tokens else "classification"
    metrics = evaluate_classifier(model, data, collate, kind, ["accuracy", "f1_macro"], batch_size=2)
    assert metrics == {"accuracy": 1.0, "f1_macro": 1.0}


def test_a_regression_head_gives_scores(make_classifier):
    data = [{**row, "labels": 0.5} for row in rows()]
    model = make_classifier(num_labels=1)
    logits, _ = predict(model, data, collate)
    metrics = evaluate_classifier(model, data, collate, "regression", ["mse"])
    assert metrics["mse"] == pytest.approx(float(((logits[:, 0] - 0.5) ** 2).mean()), rel=1e-5)


def test_what_the_model_does_not_take_is_not_given_to_it(make_classifier):
    def with_more(rows):
        batch = collate(rows)
        return {**batch, "teacher_input_ids": batch["input_ids"], "row_number": torch.zeros(len(rows))}

    model = make_classifier()
    seen = []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(sorted(inputs)), with_kwargs=True)
    np.testing.assert_array_equal(predict(model, rows(), with_more)[0], predict(model, rows(), collate)[0])
    assert seen == [["attention_mask", "input_ids"]] * 2


def test_hidden_labels_of_a_test_split_do_not_stop_a_prediction(make_classifier):
    data = [{**row, "labels": -1} for row in rows()]
    assert predict(make_classifier(), data, collate)[1].tolist() == [-1] * 7


def test_modules_are_in_their_modes_again_also_after_an_error(make_classifier):
    model = make_classifier().train()
    model.bert.embeddings.eval()
    before = [module.training for module in model.modules()]
    logits, _ = predict(model, rows(), collate)
    np.testing.assert_array_equal(predict(model, rows(), collate)[0], logits)  # dropout was off
    assert [module.training for module in model.modules()] == before
    with pytest.raises(IndexError):
        predict(model, [{"input_ids": [99], "labels": 0}], collate)
    assert [module.training for module in model.modules()] == before


def test_weights_stay_trainable_and_gather_no_gradient(make_classifier):
    model = make_classifier()
    predict(model, rows(), collate)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("data", "batch_size", "message"),
    [
        ([], 32, "must have rows, got none"),
        ([{"input_ids": [1]}], 32, r"must have 'labels', got \['attention_mask', 'input_ids'\]"),
        ([{"input_ids": [1], "labels": 0}], 0, "batch_size must be >= 1, got 0"),
    ],
)
def test_errors_say_what_is_missing(make_classifier, data, batch_size, message):
    with pytest.raises(LmcompressError, match=message):
        predict(make_classifier(), data, collate, batch_size)


def test_a_model_without_a_head_is_named(make_classifier):
    with pytest.raises(LmcompressError, match="BertModel does not return logits; load the model with its head"):
        predict(make_classifier().bert, rows(), collate)
