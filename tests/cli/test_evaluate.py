"""``lmcompress evaluate``."""

from __future__ import annotations

import json

import pytest

from lmcompress import cli
from lmcompress.model import CompressedModel


def _evaluate(capsys, *arguments):
    assert cli.run_app(["evaluate", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_it_gives_what_the_run_measured(finished, capsys):
    model = finished / "out" / "student"
    found = _evaluate(capsys, model, "--task", finished / "task", "--max-length", "12")
    measured = json.loads((finished / "out" / "metrics.json").read_text())["student"]["validation"]
    assert found["metrics"] == pytest.approx(measured)


def test_a_file_is_evaluated_whole_with_the_labels_of_the_model(reviews, capsys):
    found = _evaluate(capsys, reviews / "my-model", "--task", reviews / "reviews.csv")
    assert found["split"] == "all rows" and not any("held out" in note for note in found["notes"])
    assert cli.run_app(["evaluate", str(reviews / "my-model"), "--task", str(reviews / "reviews.csv")]) == 0
    assert "all rows (40 rows)" in " ".join(capsys.readouterr().out.split())
    # rows of one class only: accuracies of the two halves add up to the whole
    text = (reviews / "reviews.csv").read_text().splitlines()
    halves = []
    for label in ("negative", "positive"):
        rows = [row for row in text[1:] if row.endswith(label)]
        file = reviews / f"{label}.csv"
        file.write_text("\n".join([text[0], *rows]) + "\n")
        halves.append(_evaluate(capsys, reviews / "my-model", "--task", file)["metrics"]["accuracy"])
    assert sum(halves) / 2 == pytest.approx(found["metrics"]["accuracy"])


def test_metrics_are_chosen_by_name(reviews, capsys):
    arguments = [reviews / "my-model", "--task", reviews / "reviews.csv", "--metric", "f1_macro", "--metric", "f1"]
    assert list(_evaluate(capsys, *arguments)["metrics"]) == ["f1_macro", "f1"]


def test_a_limit_is_of_rows(reviews, monkeypatch, capsys):
    monkeypatch.chdir(reviews)
    assert cli.run_app(["evaluate", "my-model", "--task", "reviews.csv", "--limit", "8"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "(8 rows)" in shown and "note: what is evaluated is a subset (8 rows drawn with seed 0)" in shown


def test_of_a_language_model_a_limit_is_of_blocks(make_model, tmp_path, capsys):

    from lmcompress.data import train_tokenizer

    text = "\n".join(f"line {i} of a long speech" for i in range(300))
    (tmp_path / "speech.txt").write_text(text)
    tokenizer = train_tokenizer([text], kind="bytelevel_bpe", vocab_size=280)
    model = make_model("gpt2", "language", vocab_size=len(tokenizer))
    tokenizer.model_max_length = 16
    CompressedModel(model).save_pretrained(tmp_path / "m", tokenizer=tokenizer)
    arguments = [tmp_path / "m", "--task", tmp_path / "speech.txt", "--max-length", "16"]
    whole = _evaluate(capsys, *arguments)["metrics"]
    one, again = (_evaluate(capsys, *arguments, "--limit", limit)["metrics"] for limit in (1, 100_000))
    assert list(whole) == ["token_perplexity", "word_perplexity", "bits_per_byte"]
    assert again == pytest.approx(whole) and one != pytest.approx(whole)
    assert list(_evaluate(capsys, *arguments, "--metric", "bits_per_byte")["metrics"]) == ["bits_per_byte"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-column", "reviw"], "no column 'reviw'; did you mean 'review'? Valid are: id, review, sentiment"),
        (["--label-column", "stars"], "no column 'stars'"),
        (["--text-column", "id", "--text-column", "review", "--text-column", "id"], "--text-column: "),
        (["--split", "test"], "is one file, which is evaluated whole: leave out --split"),
        (["--metric", "pearson"], "--metric: 'pearson' does not fit"),
        (["--metric", "acuracy"], "did you mean 'accuracy'? Valid are: accuracy, f1, f1_macro,"),
        (["--max-length", "200"], "--max-length must be at most 128, the number of positions of"),
        (["--limit", "0"], "--limit: input should be greater than or equal to 1, got 0"),
    ],
)
def test_messages_name_the_option(options, message, reviews, capsys):
    arguments = ["evaluate", str(reviews / "my-model"), "--task", str(reviews / "reviews.csv"), *options]
    assert cli.run_app(arguments) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert message in shown and "=" not in shown


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("words,label", "no text column found among: words, label; name one or two with --text-column"),
        ("text,verdict", "no label column found among: text, verdict; name it with --label-column, or give a recipe's"),
    ],
)
def test_columns_that_cannot_be_guessed_are_asked_for_by_option(header, message, reviews, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text(f"{header}\na,negative\nb,positive\n")
    assert cli.run_app(["evaluate", str(reviews / "my-model"), "--task", str(tmp_path / "rows.csv")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere", "no such folder: /nowhere"),
        ("./nowhere", "no such folder: ./nowhere"),
        ("nowhere", "no such folder: nowhere; and no model of that name in the local cache"),
        ("me/nowhere", "no such folder: me/nowhere; and no model of that name in the local cache"),
    ],
)
@pytest.mark.parametrize("task", ["embedded/clinc150", "reviews.csv"])
def test_a_missing_folder_is_not_called_a_trouble_of_the_network(model, message, task, reviews, monkeypatch, capsys):
    monkeypatch.chdir(reviews)
    assert cli.run_app(["evaluate", model, "--task", task, "--limit", "5"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert message in shown and "connect" not in shown and "huggingface.co" not in shown


def test_it_refuses_a_model_of_another_task(make_model, tmp_path, capsys):
    CompressedModel(make_model("bert")).save_pretrained(tmp_path / "m")
    assert cli.run_app(["evaluate", str(tmp_path / "m"), "--task", "embedded/clinc150", "--limit", "5"]) == 2
    assert "it was not trained for this task" in " ".join(capsys.readouterr().err.split())


def test_unknown_tasks_and_splits_are_answered_with_the_nearest(reviews, capsys):
    assert cli.run_app(["evaluate", "/nowhere", "--task", "embedded/clinc15"]) == 2
    assert "did you mean 'clinc150'" in capsys.readouterr().err
    arguments = ["evaluate", str(reviews / "my-model"), "--task", "embedded/clinc150", "--split", "tst"]
    assert cli.run_app(arguments) == 2
    assert "--split: no split 'tst' in embedded/clinc150; did you mean 'test'?" in " ".join(
        capsys.readouterr().err.split()
    )
