"""Loading: every source, what is found out, and what is refused."""

from __future__ import annotations

import gzip
import json
import lzma

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lmcompress.data import EMBEDDED_SETS, GLUE_TASKS, Task, TaskKind, load_task
from lmcompress.data.labels import encode_labels
from lmcompress.errors import LmcompressError

ROWS = [{"text": f"text {i}", "label": i % 2} for i in range(20)]


def glue_rows(name: str, count: int = 6) -> Dataset:
    task = GLUE_TASKS[name]
    columns = {column: [f"{column} {i}" for i in range(count)] for column in task.text_columns}
    if task.label_names is None:
        labels = [i * 0.8 for i in range(count)]
    else:
        labels = [i % task.num_labels for i in range(count)]
    return Dataset.from_dict({**columns, "label": labels, "idx": list(range(count))})


@pytest.fixture
def glue_folder(tmp_path):
    for name in GLUE_TASKS:
        folder = tmp_path / "glue" / name
        folder.mkdir(parents=True)
        splits = ["train", "validation"]
        if name == "mnli":
            splits = ["train_subset", "validation_matched", "validation_mismatched_1000"]
        elif name == "ax":
            splits = ["test"]
        for split in splits:
            glue_rows(name).to_parquet(folder / f"{split}.parquet")
    return tmp_path


@pytest.mark.parametrize("name", sorted(set(GLUE_TASKS) - {"ax"}))
def test_every_glue_task_loads_from_a_folder(glue_folder, name):
    data = load_task(f"glue/{name}", data=glue_folder)
    assert data.task is GLUE_TASKS[name]
    assert data.train.num_rows == data.validation.num_rows == 6
    assert data.train.column_names == [*data.task.text_columns, "label"]
    label = data.train.features["label"]
    assert label == (Value("float32") if name == "stsb" else ClassLabel(names=list(data.task.label_names)))


def test_mnli_has_two_validations_and_says_what_is_a_subset(glue_folder):
    data = load_task("glue/mnli", data=str(glue_folder))
    assert list(data.splits()) == ["train", "validation", "validation_mismatched"]
    assert [note.split(" (")[0] for note in data.notes] == ["train is a subset", "validation_mismatched is a subset"]


def test_whole_files_are_not_called_subsets(glue_folder):
    assert load_task("glue/rte", data=glue_folder).notes == ()


def test_ax_has_nothing_to_train_on_and_its_labels_are_scored_if_they_are_there(glue_folder):
    data = load_task("glue/ax", data=glue_folder)
    assert (data.train.num_rows, data.validation.num_rows, data.test) == (0, 6, None)
    assert "evaluate a model that was trained on glue/mnli" in data.notes[-1]

    hidden = glue_rows("ax").remove_columns("label").add_column("label", [-1] * 6)
    data = load_task("glue/ax", data={"test": hidden})
    assert (data.train.num_rows, data.validation.num_rows, data.test.num_rows) == (0, 0, 6)
    assert "test has no labels: it can be predicted, not scored" in data.notes


def test_glue_comes_from_the_hub_without_data(monkeypatch):
    asked = []
    rows = glue_rows("mnli").cast_column("label", ClassLabel(names=list(GLUE_TASKS["mnli"].label_names)))

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        names = ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]
        return DatasetDict({name: rows for name in names})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_task("glue/mnli")
    assert asked == [(("nyu-mll/glue", "mnli"), {"split": None})]
    assert list(data.splits()) == ["train", "validation", "validation_mismatched"]
    assert data.notes == tuple(f"split 'test_{half}' of the source is not used" for half in ("matched", "mismatched"))


def test_other_hub_sets_load_by_id_and_configuration(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return DatasetDict({"train": Dataset.from_list(ROWS), "validation": Dataset.from_list(ROWS[:4])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_task("someone/something")
    wanted = {"train": "train[:20]", "validation": "dev"}
    data = load_task("someone/something:small", splits=wanted)
    assert asked == [
        (("someone/something", None), {"split": None}),
        (("someone/something", "small"), {"split": wanted}),
    ]
    assert data.notes == ("train is a subset (train[:20])",)


def test_a_hub_that_can_not_be_reached_is_said_with_the_cause(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(LmcompressError, match=r"could not load 'a/b:c' from the Hub \(ConnectionError: no route\)"):
        load_task("a/b:c")


@pytest.mark.parametrize("name", EMBEDDED_SETS)
def test_embedded_sets_are_whole(name):
    data = load_task(f"embedded/{name}")
    rows = {split: rows.num_rows for split, rows in data.splits().items()}
    assert (
        rows
        == {
            "clinc150": {"train": 15000, "validation": 3000, "test": 4500},
            "clinc150_pairs": {"train": 6000, "validation": 1000, "test": 1000},
            "inaugural": {"train": 53, "validation": 6},
        }[name]
    )
    assert data.task.num_labels == {"clinc150": 150, "clinc150_pairs": 2, "inaugural": 0}[name]
    assert data.notes == ()


def test_an_address_begins_where_addresses_begin():
    data = load_task("embedded/inaugural")
    assert data.train["text"][0].startswith("Fellow-Citizens of the Senate")
    assert data.validation["text"][0].startswith("President Clinton, distinguished guests")
    assert not any("\n\n\n" in text for split in data.splits().values() for text in split["text"])


def test_clinc_labels_name_what_was_in_the_file():
    data = load_task("embedded/clinc150", limit=3)
    assert "translate" in data.task.label_names
    assert list(data.task.label_names) == sorted(data.task.label_names)


def write(path, rows):
    kind = path.suffixes[0]
    columns = list(rows[0])
    if kind == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
        return
    if kind == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        mark = "," if kind == ".csv" else "\t"
        text = (
            "\n".join(mark.join(str(cell) for cell in line) for line in [columns, *(r.values() for r in rows)]) + "\n"
        )
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.xz"])
@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev"])
def test_a_folder_gives_the_same_whatever_its_format(tmp_path, suffix, validation):
    write(tmp_path / f"train{suffix}", ROWS)
    write(tmp_path / f"{validation}{suffix}", ROWS[:4])
    write(tmp_path / f"test{suffix}", ROWS[4:8])
    data = load_task(tmp_path)
    assert data.task.kind is TaskKind.CLASSIFICATION
    assert data.task.label_names == ("0", "1")
    assert [split.to_list() for split in data.splits().values()] == [ROWS, ROWS[:4], ROWS[4:8]]


def test_shards_are_one_split(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", ROWS[:10])
    write(tmp_path / "train-00001-of-00002.parquet", ROWS[10:])
    data = load_task(tmp_path, splits=None)
    assert data.train.num_rows + data.validation.num_rows == 20
    assert len(data.notes) == 1


def test_splits_chooses_files_of_other_names(tmp_path):
    write(tmp_path / "mine.csv", ROWS)
    write(tmp_path / "yours.csv", ROWS[:6])
    data = load_task(tmp_path, splits={"train": "mine", "validation": "yours"})
    assert (data.train.num_rows, data.validation.num_rows) == (20, 6)


@pytest.mark.parametrize("text", ["None", "NA", "007", "", 'say "so', "1.50"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_texts_in_tables_stay_what_they_are(tmp_path, text, suffix):
    rows = [{"text": text, "label": 0}, {"text": "b", "label": 1}]
    if suffix == ".csv" and '"' in text:
        rows[0]["text"] = '"say ""so"'
    write(tmp_path / f"train{suffix}", rows)
    write(tmp_path / f"dev{suffix}", rows)
    assert load_task(tmp_path).train["text"][0] == text


def test_a_single_file_has_a_tenth_held_out_each_time_the_same(tmp_path):
    write(tmp_path / "rows.csv", ROWS)
    first, second = (load_task(tmp_path / "rows.csv") for _ in range(2))
    assert (first.train.num_rows, first.validation.num_rows) == (18, 2)
    assert first.notes == ("validation is 2 rows (10%) held out of train, drawn with seed 0",)
    assert first.validation.to_list() == second.validation.to_list()
    assert {row["text"] for split in first.splits().values() for row in split} == {row["text"] for row in ROWS}


def test_a_text_file_is_one_document_to_the_byte(tmp_path):
    text = " a line \r\n\nanother\n" * 20
    (tmp_path / "train.txt").write_bytes(text.encode())
    with gzip.open(tmp_path / "test.txt.gz", "wb") as file:
        file.write(text.encode())
    data = load_task(tmp_path)
    assert data.task.kind is TaskKind.CAUSAL_LM
    assert data.test["text"][:] == [text]
    assert data.train["text"][0] + data.validation["text"][0] == text
    assert data.train["text"][0].endswith("\n")
    assert "last 10% of the training text" in data.notes[0]


@pytest.mark.parametrize(
    "data",
    [
        {"train": ROWS, "validation": ROWS[:4]},
        {"train": Dataset.from_list(ROWS), "validation": Dataset.from_list(ROWS[:4])},
        DatasetDict({"train": Dataset.from_list(ROWS), "validation": Dataset.from_list(ROWS[:4])}),
        {"train": ROWS, "dev": ROWS[:4]},
    ],
    ids=["lists", "datasets", "DatasetDict", "dev"],
)
def test_rows_in_memory_load(data):
    loaded = load_task("mine", data=data)
    assert loaded.task.name == "mine"
    assert (loaded.train.to_list(), loaded.validation.to_list()) == (ROWS, ROWS[:4])


def test_files_by_split_load(tmp_path):
    write(tmp_path / "a.csv", ROWS)
    write(tmp_path / "b.jsonl", ROWS[:4])
    data = load_task("mine", data={"train": tmp_path / "a.csv", "validation": str(tmp_path / "b.jsonl")})
    assert (data.train.to_list(), data.validation.to_list()) == (ROWS, ROWS[:4])


def test_rows_alone_are_training_rows():
    data = load_task("mine", data=ROWS)
    assert (data.train.num_rows, data.validation.num_rows) == (18, 2)


def held(labels, **columns):
    """A data set with the given labels, twice."""
    rows = Dataset.from_dict({"text": [f"t{i}" for i in range(len(labels))], **columns, "label": labels})
    return {"train": rows, "validation": rows}


@pytest.mark.parametrize(
    ("labels", "kind", "names", "encoded"),
    [
        ([0, 1, 2], "classification", ("0", "1", "2"), [0, 1, 2]),
        ([5, 1, 3], "classification", ("1", "3", "5"), [2, 0, 1]),
        (["9", "10", "9"], "classification", ("9", "10"), [0, 1, 0]),
        (["spam", "ham", "1"], "classification", ("1", "ham", "spam"), [2, 1, 0]),
        ([True, False, True], "classification", ("False", "True"), [1, 0, 1]),
        ([0.5, 2.0, -1.5], "regression", None, [0.5, 2.0, -1.5]),
        (["0.5", "2", "-1.5"], "regression", None, [0.5, 2.0, -1.5]),
        ([["b"], ["a", "b"], []], "multi_label", ("a", "b"), [[0, 1], [1, 1], [0, 0]]),
        ([[0, 1], [1, 1], [0, 0]], "multi_label", ("0", "1"), [[0, 1], [1, 1], [0, 0]]),
    ],
)
def test_labels_tell_the_kind_and_the_classes(labels, kind, names, encoded):
    data = load_task("mine", data=held(labels))
    assert (str(data.task.kind), data.task.label_names) == (kind, names)
    assert data.train["label"][:] == encoded


def test_class_names_of_the_data_are_kept():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 1]}, features=features)
    data = load_task("mine", data={"train": rows, "validation": rows})
    assert data.task.label_names == ("no", "yes")
    assert data.train["label"][:] == [1, 1]


def test_lists_of_class_labels_are_several_labels():
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["a", "b", "c"]))})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [[2, 0], []]}, features=features)
    data = load_task("mine", data={"train": rows, "validation": rows})
    assert data.task.kind is TaskKind.MULTI_LABEL
    assert data.train["label"][:] == [[1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("labels", [[["O", "B"], ["O"]], [[0, 1], [0]]], ids=["names", "numbers"])
def test_lists_of_words_with_lists_of_labels_are_token_classification(labels):
    rows = Dataset.from_dict({"tokens": [["a", "b"], ["c"]], "ner_tags": labels})
    data = load_task("mine", data={"train": rows, "validation": rows})
    assert data.task.kind is TaskKind.TOKEN_CLASSIFICATION
    assert data.task.label_names == (("B", "O") if labels[0][0] == "O" else ("0", "1"))
    assert len(data.train["ner_tags"][0]) == 2


@pytest.mark.parametrize(
    "columns",
    [("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"),
     ("sentence",), ("text",), ("review",), ("content",), ("body",)],
)  # fmt: skip
def test_usual_text_columns_are_found(columns):
    rows = [{**dict.fromkeys(columns, "x"), "label": i, "idx": i} for i in range(2)]
    assert load_task("mine", data={"train": rows, "validation": rows}).task.text_columns == columns


@pytest.mark.parametrize("column", ["label", "score", "sentiment", "class", "category", "target"])
def test_usual_label_columns_are_found(column):
    rows = [{"id": "1", "text": "a", column: "x"}, {"id": "2", "text": "b", column: "y"}] * 5
    assert load_task("mine", data=rows).task.label_column == column


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=2, unique=True))
def test_any_names_are_mapped_to_their_place_among_the_sorted(names):
    assume(not any(name.lstrip("-").isdecimal() for name in names))
    rows = [{"text": "x", "label": name} for name in names]
    data = load_task("mine", data={"train": rows, "validation": rows}, kind="classification")
    assert [data.task.label_names[label] for label in data.train["label"]] == names


def test_glue_labels_may_be_names_or_numbers_written_out():
    for labels in (["negative", "positive"], ["0", "1"], [0, 1]):
        rows = [{"sentence": "x", "label": label} for label in labels]
        assert load_task("glue/sst2", data={"train": rows, "validation": rows}).train["label"][:] == [0, 1]


def test_the_mapping_is_fixed_by_train():
    data = load_task("mine", data={"train": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
                                   "validation": [{"text": "c", "label": "y"}]})  # fmt: skip
    assert data.validation["label"][:] == [1]


@pytest.mark.parametrize("limit", [1, 7, 20, 100])
def test_a_limit_draws_the_same_rows_in_order_and_says_so(limit):
    first, second = (load_task("mine", data={"train": ROWS, "validation": ROWS[:1]}, limit=limit) for _ in range(2))
    assert first.train.num_rows == min(limit, 20)
    assert first.train.to_list() == second.train.to_list()
    assert first.train.to_list() == [row for row in ROWS if row in first.train.to_list()]
    said = (f"train is a subset ({limit} rows drawn with seed 0)",) if limit < 20 else ()
    assert first.notes == said
    assert first.task.label_names == ("0", "1")


def test_a_test_split_may_hide_its_labels():
    hidden = [{"text": "x", "label": -1}]
    data = load_task("mine", data={"train": ROWS, "validation": ROWS, "test": hidden})
    assert data.test.column_names == ["text"]
    assert data.notes == ("test has no labels: it can be predicted, not scored",)


def two(*rows):
    return {"train": list(rows), "validation": list(rows)}


A, B = {"text": "a", "label": 0}, {"text": "b", "label": 1}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("glue/mrcp", {}, "no GLUE task 'mrcp'; did you mean 'mrpc'"),
        ("sst2", {}, "called 'glue/sst2', got 'sst2'"),
        ("embedded/clinc", {}, "no embedded data set 'clinc'; did you mean 'clinc150'"),
        ("embedded/clinc150", {"data": two(A, B)}, "embedded/clinc150 is in the package; leave out data"),
        ("glue/sst2", {"kind": "regression"}, "glue/sst2 fixes its own columns and kind"),
        ("mine", {"data": "nowhere"}, "no such file or folder: nowhere"),
        ("nowhere.csv", {}, "no such file or folder: nowhere.csv"),
        ("m", {"data": two(A, B), "limit": 0}, "limit must be >= 1, got 0"),
        ("m", {"data": two(A, B), "splits": {"trian": "a"}}, "unknown split 'trian'; did you mean 'train'"),
        ("m", {"data": two(A, B), "splits": {"train": "trin"}}, "no split 'trin'; did you mean 'train'"),
        ("m", {"data": two(A, B), "kind": "clasification"}, "unknown kind of task 'clasification'"),
        ("m", {"data": two(A, B), "text_columns": ["txt"]}, "no column 'txt'; did you mean 'text'\\? Valid are: label"),
        ("m", {"data": two(A, B), "label_column": "lable"}, "no column 'lable'; did you mean 'label'"),
        ("m", {"data": two(A, B), "text_columns": ["text", "text"]}, "must be two different columns, got 'text' twice"),
        ("m", {"data": two(A, B), "label_column": "text"}, "not be a column of texts, got 'text'. Valid are: label"),
        ("m", {"data": two(A, B), "kind": "causal_lm", "label_column": "label"}, "a causal_lm task has no label col"),
        ("m", {"data": two({"q": "a", "label": 0})}, "no text column found among: q, label; name one or two"),
        ("m", {"data": two({"text": "a", "mood": 0})}, "no label column found among: text, mood; name it with"),
        ("m", {"data": {"train": []}}, "split 'train' has no rows"),
        ("m", {"data": {"train": Dataset.from_list([A]).select([])}}, "split 'train' of m has no rows"),
        ("m", {"data": {"train": 3}}, "split 'train' must be a Dataset, a list of dicts or a file, got int"),
        ("m", {"data": {"test": [A, B]}}, "m has no train split, only: test"),
        ("m", {"data": {"other": [A, B]}}, "m has no train split, only: other"),
        ("m", {"data": [{"text": "a", "label": 0.5}]}, "one training row and no validation split"),
        ("m", {"data": [{"text": "x"}]}, "the training text is too short to hold out a part of it"),
        ("m", {"data": two({"text": 3, "label": 0}, B | {"text": 4})}, "must hold strings, got int64"),
        ("m", {"data": two(A, {"text": None, "label": 1})}, "'text' of split 'train': row 1 \\(from 0\\) is empty"),
        ("m", {"data": two(A, B, B | {"label": -1})}, "row 2 \\(from 0\\) has the label -1, which means none"),
        ("m", {"data": two(A, B | {"label": None})}, "row 1 \\(from 0\\) has no label \\(null\\)"),
        ("m", {"data": two(A, A)}, "must hold at least two classes, got only \\['0'\\]"),
        ("m", {"data": {"train": [A, B], "validation": [A, A | {"label": 7}]}},
         "split 'validation': row 1 \\(from 0\\) has the label 7, which is out of range; the 2 classes"),
        ("m", {"data": {"train": [A | {"label": "x"}, B | {"label": "y"}],
                        "validation": [A | {"label": "1"}, A | {"label": "z"}]}},
         "row 0 \\(from 0\\) has the label '1', which is out of range"),
        ("m", {"data": {"train": [A, B], "validation": [{"text": "a"}]}},
         "no column 'label' in split 'validation'. Valid are: text"),
        ("m", {"data": two(A | {"label": float("nan")}, A | {"label": 0.5})},
         "row 0 \\(from 0\\) must be a finite number, got nan"),
        ("m", {"data": two(A | {"label": "x"}, B | {"label": "y"}), "kind": "regression"},
         "row 0 \\(from 0\\) must be a number, got 'x'"),
        ("m", {"data": two(A, B), "kind": "multi_label"}, "column 'label' must hold lists for a multi_label task"),
        ("m", {"data": two(A | {"label": ["x", "y"]}), "kind": "regression"}, "must not hold lists for a regression"),
        ("m", {"data": two(A | {"label": [0, 1]}, A | {"label": [0, 2]})}, "row 1 .* must be 2 zeros and ones"),
        ("m", {"data": {"train": [A | {"label": [0, 1]}], "validation": [A | {"label": [0, 1, 1]}]}},
         "must have 2 labels per row, as in training, got 3"),
        ("m", {"data": two(A | {"label": {"a": 1}})}, "labels must be numbers, strings or lists of them"),
        ("m", {"data": two({"tokens": ["a", "b"], "tags": ["x"]}, {"tokens": ["a"], "tags": ["y"]})},
         "row 0 \\(from 0\\) must have one label for each word, got 2 words and 1 labels"),
        ("m", {"data": two({"tokens": "a b", "tags": ["x", "y"]}), "kind": "token_classification"},
         "must hold lists of strings, got"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(name, options, message):
    with pytest.raises(LmcompressError, match=message):
        load_task(name, **options)


def test_two_orders_of_label_names_are_refused():
    def rows(names):
        features = Features({"sentence": Value("string"), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]}, features=features)

    good, bad = rows(["negative", "positive"]), rows(["positive", "negative"])
    message = r"split 'validation' has the label names \['positive', 'negative'\], but the task has \['negative', 'pos"
    with pytest.raises(LmcompressError, match=message):
        load_task("glue/sst2", data={"train": good, "validation": bad})
    with pytest.raises(LmcompressError, match=message):
        load_task("mine", data={"train": good, "validation": bad})


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"notes.md": "x"}, {}, "no data files in .*; expected train and validation as .parquet"),
        ({"a.csv": "x"}, {}, "no file in .* is named train, validation or test, but there are: a.csv"),
        ({"train.csv": ""}, {}, "train.csv is empty"),
        ({"train.csv": "text,label\n"}, {}, "split 'train' of .* has no rows"),
        (
            {"train.csv": "x", "train_subset.csv": "x"},
            {},
            "two files for split 'train' in .*: train.csv and train_subset",
        ),
        ({"dev.csv": "x", "val.csv": "x"}, {}, "two files for split 'validation'"),
        ({"train.csv": "x"}, {"splits": {"train": "trainn"}}, "no files named 'trainn' in .*; did you mean 'train'"),
        ({"train.csv": "x", "train.tsv": "x"}, {"splits": {"train": "train"}}, "2 files named 'train' in"),
    ],
)
def test_folders_that_can_not_be_read_are_refused(tmp_path, files, options, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(LmcompressError, match=message):
        load_task(tmp_path, **options)


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_the_mark_that_spreadsheets_begin_a_table_with_is_no_part_of_a_name(tmp_path, suffix, separator):
    rows = [f"{'ab'[i % 2]} text{separator}{i % 2}" for i in range(20)]
    file = tmp_path / f"exported.{suffix}"
    file.write_text("\n".join([f"text{separator}label", *rows]), "utf-8-sig")
    assert load_task(file).train.column_names == ["text", "label"]


def test_files_that_can_not_be_read_are_refused(tmp_path):
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(LmcompressError, match="unknown format of a.doc; expected one of .parquet"):
        load_task(tmp_path / "a.doc")
    (tmp_path / "c.csv").write_text("text,label\na,0\nb,1,2,3\n")
    with pytest.raises(
        LmcompressError, match="could not read .*c.csv: ParserError: .*Expected 2 fields in line 3, saw 4"
    ):
        load_task(tmp_path / "c.csv")
    (tmp_path / "d.parquet").write_text("x")
    with pytest.raises(LmcompressError, match="could not read .*d.parquet: Arrow"):
        load_task(tmp_path / "d.parquet")
    Dataset.from_list([A]).select([]).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(LmcompressError, match="e.parquet|split 'train' of .* has no rows"):
        load_task(tmp_path / "e.parquet")
    with pytest.raises(LmcompressError, match="no such file: .*b.csv"):
        load_task("mine", data={"train": tmp_path / "b.csv"})
    with pytest.raises(LmcompressError, match="no folder .*; data= must hold glue/sst2/"):
        load_task("glue/sst2", data=tmp_path)


def test_a_task_without_labels_has_none_to_encode():
    texts = Dataset.from_dict({"text": ["a"]})
    with pytest.raises(LmcompressError, match="lines is a causal_lm task, which has no labels to encode"):
        encode_labels(texts, Task("lines", "causal_lm", ("text",)), "train")
