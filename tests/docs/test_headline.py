"""The README's table and its picture."""

import math

import pytest
from doc_pages import write_results


def _row(task, score, **more):
    return dict(task=task, score=score, spread=None, seeds=1, bytes=8_000_000) | more


@pytest.fixture
def results(tmp_path):
    """A teacher and its student on two tasks, the same teacher at four bits on one, and a time."""
    teachers = [_row("sst2", 90.0, role="teacher"), _row("mrpc", 80.0, role="teacher")]
    students = [_row("sst2", 81.0, role="distilled"), _row("mrpc", 72.0, role="distilled", spread=3.0, seeds=3)]
    write_results(tmp_path, "distillation", [*teachers, *students, _row("cola", 10.0, role="distilled")])
    four = _row("sst2", 90.0, kind="without training", name="gptq", bits=4, bytes=1_000_000)
    write_results(tmp_path, "qat_glue", [_row("sst2", 90.0, kind="teacher"), four])
    times = [
        dict(question="encoder", model="MiniLM", method="lmcompress W4A8", batch=batch, speedup=speed)
        for batch, speed in ((1, 9.9), (32, 3.25))
    ]
    write_results(tmp_path, "quant_speed", times)
    return tmp_path


def test_a_way_is_compared_with_its_own_teacher_on_its_own_tasks(tables, results):
    student, four = tables.headline.points(results)
    assert (student.kept, four.kept) == (90.0, 100.0)
    assert sorted(student.scores) == ["mrpc", "sst2"]
    assert (four.megabytes, four.speedup, student.speedup) == (1.0, 3.25, None)


def test_the_interval_is_of_independent_rows_and_of_seeds(tables, results):
    student, four = tables.headline.points(results)
    assert four.interval == pytest.approx(100 * 1.96 * math.sqrt(0.9 * 0.1 / 872) / 0.9)
    variance = 0.81 * 0.19 / 872 + 0.72 * 0.28 / 408 + 0.03**2 / 3
    assert student.interval == pytest.approx(100 * 1.96 * math.sqrt(variance) / 2 / 0.85)


def test_the_table_says_what_is_missing_and_how_many_seeds(tables, results):
    table = tables.headline.headline(results)
    assert "| distilled, 3 of 6 layers | 81.0 | 72.0 ± 3.0 | 90.0 % | 8.0 MB | – |" in table
    assert "| 4 bits, no training | 90.0 | – | 100.0 % (of 1) | 1.0 MB | 3.2 × |" in table
    assert "standard deviation of 3 seeds (MRPC); all else is one seed" in table


def test_every_row_names_the_commands_that_measured_it(tables, results):
    told = tables.headline.sources(results)
    assert (
        "| 4 bits, no training | GPTQ on 512 rows, activations and embeddings too | `python x`<br>`python x` |" in told
    )


def test_a_choice_says_what_came_of_it(tables, results):
    table = tables.choices.choices_of_readme(results)
    assert "| a minute | 100 % of the score on 1 task, 8.0 × smaller, 3.2 × faster |" in table
    assert "[vocabulary pruning](docs/guides/pruning_vocabulary.md)" in table
    assert "| minutes | not measured |" in table


def test_there_is_no_table_without_results(tables, tmp_path):
    assert tables.headline.sources(tmp_path) is tables.choices.choices(tmp_path) is None
    assert tables.headline.headline(tmp_path) is None


def test_the_committed_picture_shows_the_committed_results(picture):
    assert picture.shown() == picture.drawn(), "run: python benchmarks/picture.py"


def test_a_picture_of_other_results_is_told_from_the_committed_one(picture, results, tmp_path, monkeypatch):
    file = tmp_path / "picture.svg"
    picture.draw(file, results)
    assert picture.shown(file) == picture.drawn(results)
    monkeypatch.setattr("sys.argv", ["picture.py", "--check", "--picture", str(file)])
    with pytest.raises(SystemExit, match="shows other numbers; run: python benchmarks/picture.py"):
        picture.main()
    file.write_text("<svg/>")
    with pytest.raises(SystemExit, match="has no numbers"):
        picture.main()
