"""The page of a run in all the states that it must show."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from reports import full_report, language_model, plain_report, row, with_predictions
from rich.console import Console

from lmcompress.cli.console import print_how_to_load
from lmcompress.data import TaskKind
from lmcompress.evaluation import BUSY
from lmcompress.recipes.building import auto_class
from lmcompress.reporting import report_html, write_report
from lmcompress.reporting.cautions import cautions
from lmcompress.reporting.headline import speed_text
from lmcompress.reporting.models import collect, pick
from lmcompress.reporting.page import run_view

VOID = {"meta", "link", "br", "img", "path", "circle", "rect", "use"}
LOADS = {"img", "script", "link", "iframe", "source", "video", "audio", "object", "embed", "image"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects text and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.loaded, self.links, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self._note(tag, dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def _note(self, tag, attrs):
        if tag in LOADS:
            self.loaded += [attrs[key] for key in ("src", "href", "data", "xlink:href") if key in attrs]
        if tag == "a":
            self.links.append(attrs["href"])
        if "id" in attrs:
            self.ids.append(attrs["id"])

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words)).replace("\u00a0", " ")


def _page(report, folder=None):
    text = report_html(report, folder)
    page = Page(text)
    # nothing is fetched: all addresses are data, or links that a reader may click
    assert page.loaded == ["data:,"] and "@import" not in text and not re.search(r"url\((?!#)", text)
    assert len(set(page.ids)) == len(page.ids)
    for slot in ("#010101", "#060606"):
        assert slot not in text
    return page


def test_a_full_report_has_every_section():
    page = _page(full_report())
    for heading in (
        "All models of this run",
        "What quality costs",
        "What was learned from what",
        "What pruning has left in",
        "Where the bytes are",
        "Bits of each matrix in",
        "Does the saved model match the measured one?",
        "Use it, do it again",
    ):
        assert heading in page.text
    assert page.links == ["https://arxiv.org/abs/1503.02531"]
    assert "student: " not in page.text and "needs lmcompress to load: every block needs <all> heads" in page.text


def test_the_headline_says_the_result_and_its_interval_stands_below():
    view = run_view(full_report())
    expected = (
        "The student keeps 99.4 % of its teacher’s accuracy at 40 % of its parameters, and answers one row 2.0× faster."
    )
    assert view["headline"].striptags() == expected
    assert "distillation is worth 9.5 ± " in view["lead"].striptags()
    kept = view["figures"][0]
    assert (kept["value"], kept["unit"]) == ("99.4", "%") and "95 %, paired rows" in kept["sure"]


def test_reports_of_earlier_versions_are_shown_without_intervals():
    page = _page(plain_report())
    assert "The student keeps 75.0 % of its teacher’s accuracy" in page.text and "No intervals." in page.text
    assert "2.00× faster" in page.text and "What was learned" not in page.text and "What quality costs" in page.text


def test_a_run_of_one_model_is_told_by_its_score():
    report = plain_report()
    report["rows"] = report["rows"][:1]
    page = _page(report)
    assert "teacher reaches 80.0 % accuracy on validation, in 2.00 MB." in page.text
    assert "minus" not in page.text and "What quality costs" not in page.text


def test_no_share_of_a_teacher_at_chance_level_is_shown():
    # 109 % of a teacher that knows nothing
    report = with_predictions(plain_report(), {"teacher": (198, 0), "student": (216, 7)})
    page = _page(report)
    assert "No result: teacher and student are at chance level." in page.text and "Chance level." in page.text
    assert "kept" not in page.text and "109" not in page.text and "What quality costs" not in page.text


def test_a_student_at_chance_level_keeps_nothing():
    report = with_predictions(plain_report(), {"teacher": (360, 0), "student": (200, 0)})
    page = _page(report)
    assert "The student is at chance level: nothing of its teacher is left." in page.text
    assert "At chance level: student (50.0 %)." in page.text and "accuracy kept" not in page.text


def test_a_language_model_is_told_by_the_rise_of_its_perplexity():
    page = _page(language_model())
    assert re.search(
        r"The student has a perplexity \d+\.\d % above its teacher’s at 100 % of its parameters|size", page.text
    )
    assert "rise over teacher" in page.text and "Down and left is better." in page.text
    assert "accuracy" not in page.text


def test_without_latency_and_size_their_columns_are_empty():
    report = full_report()
    for entry in report["rows"]:
        entry |= {"latency": [], "size_bytes": None, "modules": None}
    page = _page(report)
    assert (
        "faster" not in page.text and "Where the bytes are" not in page.text and "What quality costs" not in page.text
    )


def _titles(report):
    return {caution.title: caution for caution in cautions(report, collect(report))}


def test_a_quiet_run_of_many_rows_warns_of_its_seed_alone():
    report = with_predictions(plain_report(), {"teacher": (360, 0), "student": (330, 0)})
    assert list(_titles(report)) == ["One seed."]


def test_wide_quartiles_are_a_busy_machine():
    report = plain_report()
    report["rows"][1]["latency"][0]["upper_ms"] = 3.0
    assert (
        "Interquartile ranges reach 52 % of the median (student, 1 row)"
        in _titles(report)["The machine was busy."].text
    )


def test_equal_models_with_unlike_times_are_a_busy_machine():
    shape = {"hidden_size": 16, "blocks": [{"heads": 2, "ffn": 32}]}
    report = plain_report()
    report["rows"] += [
        row("a", "student", 0.6, 500_000, 0.3, "14.07x faster", **shape),
        row("b", "control", 0.6, 500_000, 1.5, "2.72x faster", **shape),
    ]
    found = _titles(report)["The machine was busy."]
    assert "a and b have the same shape, and their times differ by 5.0×" in found.text
    report["rows"][-1]["quantization"] = {"matrices": []}
    assert "The machine was busy." not in _titles(report)


def test_without_a_verdict_the_machine_was_busy_and_no_sentence_says_otherwise():
    report = plain_report()
    entry = report["rows"][1]["latency"][0]
    entry["verdict"] = BUSY
    found = _titles(report)["The machine was busy."].text
    assert "Timed twice in the same rounds, teacher differs from itself, or models waited for a core (1 row)." in found
    teacher, student, *_ = collect(report)
    assert speed_text(student, teacher, 1) == BUSY
    page = report_html(report)
    assert "with no verdict on its speed, as the machine was busy" in page and "no measurable difference" not in page


def test_a_control_as_good_as_the_student_is_told():
    report = full_report()
    assert not any("gains nothing" in title for title in _titles(report))
    with_predictions(report, {e["name"]: (350, 2 * i) for i, e in enumerate(report["rows"])})
    found = _titles(report)["student gains nothing from its teacher that these rows can show."]
    assert found.text.startswith("Its control is as good: 0.0 (−")


def test_a_share_of_the_blocks_is_not_one_of_the_model():
    found = _titles(full_report())["“60 % pruned” is of the blocks’ parameters."]
    assert (found.level, found.text) == ("note", "Of all parameters of pruned, 30 % are pruned.")


@pytest.mark.parametrize(
    ("change", "title", "level"),
    [
        ({"notes": ["train is a subset (600 rows drawn with seed 0)"]}, "A subset of the data.", "warn"),
        ({"notes": ["21 rows (3.50%) of test are cut at 24 tokens"]}, "Truncated rows.", "note"),
        ({"notes": ["21 rows (3.50%) of test are truncated to 24 tokens"]}, "Truncated rows.", "note"),
    ],
)
def test_notes_of_the_data_are_told(change, title, level):
    report = plain_report() | change
    assert _titles(report)[title].level == level
    assert run_view(report)["notes"] == []


def test_what_is_slower_is_told():
    assert _titles(full_report())["int4 is slower."].text == "Compared with teacher: 0.67×: slower on 1 row."


def test_a_checkpoint_that_is_not_what_was_trained_stops():
    report = plain_report()
    report["rows"][1]["equivalence"] = {"max_error": 0.031, "relative_error": 0.01}
    found = cautions(report, collect(report))[0]
    assert (found.level, found.title) == (
        "stop",
        "The saved model differs from the trained one.",
    ) and "3.1e-02" in found.text


def test_few_rows_are_told():
    report = language_model()
    for entry in report["rows"]:
        evidence = entry["evidence"]["validation"]
        for key, values in evidence.items():
            from lmcompress.reporting.evidence import decode, encode

            evidence[key] = encode(decode(values)[:20])
    assert "Only 20 windows." in _titles(report)


def test_the_pick_is_the_smallest_within_a_point_or_what_the_report_names():
    report = full_report()
    models = collect(report)
    assert pick(report, models).name == "student"
    assert pick(report | {"picked": "pruned"}, models).name == "pruned"
    far = with_predictions(plain_report(), {"teacher": (360, 0), "student": (300, 0)})
    assert pick(far, collect(far)).name == "student"


def test_html_escapes_what_comes_from_data():
    report = full_report() | {"recipe": "<script>alert(1)</script>", "notes": ["<b>"], "description": "<i>"}
    report["rows"][1]["name"] = "<u>"
    text = report_html(report)
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text and "<li>&lt;b&gt;</li>" in text
    assert "<u>" not in text and "<i>" not in text
    Page(text)


def test_recipe_and_logs_are_looked_up_in_the_folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: tiny\nseed: 0\n")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "stage.json").write_text('{"log": [{"step": 1, "loss": 2.0}, {"train_runtime": 1}]}')
    page = _page(plain_report(), tmp_path)
    assert "Recipe, resolved (2 lines of YAML)" in page.text and "What was learned from what" in page.text


def test_what_is_written_is_the_page(tmp_path):
    report = full_report()
    write_report(report, tmp_path)
    assert (tmp_path / "report.html").read_text() == report_html(report, tmp_path)


def test_the_same_report_makes_the_same_page():
    assert report_html(full_report()) == report_html(full_report())


@pytest.mark.parametrize("kind", TaskKind)
def test_page_and_terminal_load_a_model_with_the_class_that_the_recipe_makes_it_of(kind):
    report = plain_report() | {"kind": str(kind)}
    name = auto_class(SimpleNamespace(kind=kind)).__name__
    assert f"from transformers import {name}, AutoTokenizer" in run_view(report)["load"]
    console = Console(file=io.StringIO(), width=120)
    print_how_to_load(console, report)
    assert f"import {name}\n  model = {name}.from_pretrained(" in console.file.getvalue()
