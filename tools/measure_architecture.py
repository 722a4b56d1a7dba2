"""Measures the package as a reader meets it, for the table in docs/architecture.md.

    python tools/measure_architecture.py             # measure, write benchmarks/results/architecture.json and the table
    python tools/measure_architecture.py --check     # write nothing; exit 1 where a number of the text differs

Sizes of files and functions, docstrings, repeated lines and imports are read off the source text. The way of a batch
and of a checkpoint are counted as they are executed: the package's files, and the lines of its functions, that one
optimizer step of the quickstart's student runs, and that saving and reloading a pruned int8 model run. CPU times are
medians over processes of their own, beside the import of transformers in the same run.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lmcompress"
PAGE = ROOT / "docs" / "architecture.md"
RUN = 6
"""Lines that must be the same in two places to count as repeated."""

# from the top to the bottom; those in one row do not import one another
LAYERS = [
    ["__main__"],
    ["cli"],
    ["recipes"],
    ["reporting"],
    ["proof"],
    ["trainers"],
    ["distillation", "pruning", "quantization", "clustering"],
    ["students"],
    ["sentences"],
    ["method"],
    ["model"],
    ["export"],
    ["evaluation"],
    ["activations"],
    ["checkpoint"],
    ["families"],
    ["nn"],
    ["kernels"],
    ["numerics"],
    ["entropy_coding"],
    ["data"],
    ["schedules"],
    ["registry"],
    ["errors"],
]
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}
NEW = (
    "registry.py",
    "cli/compare.py",
    "cli/usage.py",
    "recipes/checks.py",
    "recipes/evidence.py",
    "recipes/metrics.py",
    *(f"reporting/{name}.py" for name in ("anatomy", "cautions", "compare", "comparison", "evidence", "figures")),
    *(f"reporting/{name}.py" for name in ("headline", "labels", "models", "page", "sections", "svg", "wording")),
)
"""Files that hold only what came with the redrawn house: custom parts, checks before a run, the report page."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files() -> list[Path]:
    """The package's Python files."""
    return sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    """The folder or loose file directly below the package that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_imports(tree: ast.AST, file: Path) -> list[tuple[ast.AST, str]]:
    """Every import of this package below ``tree``, as the node and the dotted name within the package."""
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["lmcompress", *file.relative_to(PACKAGE).parts[: -node.level or None]]
                base = ".".join([*package, *filter(None, [base])])
            # "from lmcompress import model" imports a module, "from lmcompress import CompressedModel" a name
            names = [alias.name for alias in node.names if alias.name in LEVEL]
            found += [(node, f"{base}.{name}") for name in names] if base == "lmcompress" and names else [(node, base)]
    return [(node, name) for node, name in found if name.split(".")[0] == "lmcompress"]


def arrows() -> set[tuple[str, str]]:
    """The pairs of rooms of which the first imports the second."""
    found = set()
    for file in files():
        for _, name in own_imports(ast.parse(file.read_text("utf-8")), file):
            there = (name.split(".") + ["__init__"])[1]
            if there in LEVEL and room(file) in LEVEL and there != room(file):
                found.add((room(file), there))
    return found


def docstring_lines(node: ast.AST) -> int:
    """How many lines of a module, class or function are its docstring."""
    body = getattr(node, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return (first.end_lineno or first.lineno) - first.lineno + 1
    return 0


def functions(tree: ast.AST) -> list[Function]:
    """All functions and methods."""
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def function_lines(node: Function) -> int:
    """Lines of a function without its docstring."""
    return (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)


def code_lines(text: str) -> list[int]:
    """The numbers of the lines that hold code: no docstrings, comments or blank lines."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            length := docstring_lines(node)
        ):
            documented |= set(range(node.body[0].lineno, node.body[0].lineno + length))
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            found |= set(range(token.start[0], token.end[0] + 1))
    return sorted(found - documented)


def import_lines(tree: ast.Module) -> int:
    """Lines of import statements, those within functions among them."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes)


def undocumented(trees: dict[Path, ast.Module]) -> tuple[list[str], int]:
    """Public functions and methods without a docstring, and how many there are in all.

    A method that overrides one of a base class within the package has that one's docstring, as ``help()`` shows it.
    """
    classes = {node.name: node for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)}

    def documented(name: str, owner: ast.ClassDef) -> bool:
        own = next((node for node in owner.body if isinstance(node, Function) and node.name == name), None)
        if own is not None and ast.get_docstring(own):
            return True
        bases = (base.value if isinstance(base, ast.Subscript) else base for base in owner.bases)
        named = (classes.get(base.id) for base in bases if isinstance(base, ast.Name))
        return any(documented(name, base) for base in named if base is not None and base is not owner)

    missing, total = [], 0
    for file, tree in trees.items():
        for node in tree.body:
            owner = node if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else None
            for inner in owner.body if owner is not None else [node]:
                if not isinstance(inner, Function) or inner.name.startswith("_"):
                    continue
                total += 1
                if not (ast.get_docstring(inner) or owner is not None and documented(inner.name, owner)):
                    missing.append(f"{file.relative_to(PACKAGE)}:{inner.lineno} {inner.name}")
    return missing, total


def repeated_share() -> float:
    """The share of code lines that lie in a run of :data:`RUN` lines which stands elsewhere too; imports left out."""
    lines: list[list[str]] = []
    for file in files():
        text = file.read_text("utf-8")
        imported = {
            number
            for node in ast.walk(ast.parse(text))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        source = text.splitlines()
        kept = [source[number - 1].strip() for number in code_lines(text) if number not in imported]
        # brackets alone say nothing
        lines.append([line for line in kept if re.search(r"\w", line)])
    runs = Counter(tuple(own[i : i + RUN]) for own in lines for i in range(len(own) - RUN + 1))
    repeated = 0
    for own in lines:
        marked: set[int] = set()
        for i in range(len(own) - RUN + 1):
            if runs[tuple(own[i : i + RUN])] > 1:
                marked |= set(range(i, i + RUN))
        repeated += len(marked)
    return repeated / sum(map(len, lines))


def source() -> dict[str, Any]:
    """What the text of the package says."""
    texts = {file: file.read_text("utf-8") for file in files()}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    sizes = sorted(text.count("\n") for text in texts.values())
    lengths = sorted(function_lines(node) for tree in trees.values() for node in functions(tree))
    missing, public = undocumented(trees)
    coded = {file: len(code_lines(text)) for file, text in texts.items()}
    total, new = sum(coded.values()), sum(coded[PACKAGE / name] for name in NEW)
    imports = sum(import_lines(tree) for file, tree in trees.items() if str(file.relative_to(PACKAGE)) not in NEW)
    pairs = arrows()
    return {
        "rooms": len({room(file) for file in texts} - {"__init__"}),
        "imports between rooms": len(pairs),
        "imports that point up": sum(LEVEL[there] <= LEVEL[here] for here, there in pairs),
        "files": len(sizes),
        "lines of a file, median": statistics.median(sizes),
        "lines of a file, nine in ten": sizes[int(0.9 * len(sizes))],
        "lines of a file, greatest": sizes[-1],
        "lines of a function, median": statistics.median(lengths),
        "lines of a function, nine in ten": lengths[int(0.9 * len(lengths))],
        "lines of a function, greatest": lengths[-1],
        "public functions with a docstring, %": 100 * (public - len(missing)) / public,
        "repeated lines, %": 100 * repeated_share(),
        "lines of code": total,
        "lines of code, of what is new": new,
        "lines of code, of import statements": imports,
        "lines of code, without both": total - new - imports,
    }


class Trace:
    """The package's functions that are executed while it is on."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()

    def _called(self, frame: Any, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        # a template's lines are executed under its name too
        if event == "call" and file.startswith(str(PACKAGE)) and file.endswith(".py"):
            self.seen.add((file, frame.f_code.co_firstlineno))

    def start(self) -> None:
        """Begin to look."""
        sys.setprofile(self._called)

    def stop(self) -> None:
        """Look no more."""
        sys.setprofile(None)

    def lines(self) -> dict[str, int]:
        """Lines to read, without docstrings, by file: of the outermost functions that were executed."""
        found: dict[str, int] = {}
        for file in sorted({file for file, _ in self.seen}):
            starts = {line for name, line in self.seen if name == file}
            covered: set[int] = set()
            for node in functions(ast.parse(Path(file).read_text("utf-8"))):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if first in starts or node.lineno in starts:
                    own = set(range(first, (node.end_lineno or node.lineno) + 1))
                    covered |= own - set(range(node.body[0].lineno, node.body[0].lineno + docstring_lines(node)))
            if covered:
                found[str(Path(file).relative_to(PACKAGE))] = len(covered)
        return found


def step_trace(folder: Path) -> Trace:
    """What one optimizer step of the quickstart's student runs, from its batches to the optimizer's step."""
    import transformers.trainer
    from transformers import TrainerCallback

    from lmcompress.recipes import load_recipe, run

    trace = Trace()

    class Tracer(TrainerCallback):  # type: ignore[misc]
        """Looks at the second step of the student; what is done only once has been done by then."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The batches are there."""
            if state.global_step == 1 and args.output_dir.endswith("student"):
                trace.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The optimizer has stepped."""
            trace.stop()

    few = ["training.max_steps=2", "training.save_strategy=no", "task.limit=200", "evaluation.latency_batches=[]"]
    transformers.trainer.DEFAULT_CALLBACKS.append(Tracer)
    try:
        run(load_recipe("quickstart", few), folder)
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(Tracer)
    return trace


def checkpoint_trace(folder: Path) -> tuple[Trace, Trace]:
    """What saving a half-pruned int8 BERT runs, the round-trip check among it, and what loading it runs."""
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    from lmcompress import CompressedModel
    from lmcompress.pruning import PruningConfig, prune
    from lmcompress.quantization import quantize

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=60)
    model = BertForSequenceClassification(BertConfig(**sizes)).eval()
    ids = torch.randint(5, 60, (4, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0, 1])}
    prune(model, PruningConfig(target={"sparsity": 0.5}, criterion="l1"), [batch])
    quantize(model, batches=[batch], progress=False)
    saving, loading = Trace(), Trace()
    saving.start()
    CompressedModel(model).save_pretrained(folder)
    saving.stop()
    loading.start()
    AutoModelForSequenceClassification.from_pretrained(folder)
    loading.stop()
    return saving, loading


def cpu_seconds(*command: str, repeats: int = 5) -> float:
    """The median CPU time of a command, user and system, in seconds."""
    taken = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(taken)


# what registering a quantizer of Transformers cannot do without
_NEEDED = "from transformers.quantizers import HfQuantizer; from transformers.quantizers.auto import register_quantizer"


def times() -> dict[str, Any]:
    """CPU times of what a user waits for first, and their ratios."""
    python = sys.executable
    baseline = cpu_seconds(python, "-c", "import transformers")
    needed = cpu_seconds(python, "-c", _NEEDED)
    helped = cpu_seconds(python, "-m", "lmcompress", "--help")
    imported = cpu_seconds(python, "-c", "import lmcompress")
    return {
        "import transformers, CPU s": baseline,
        "lmcompress --help, CPU s": helped,
        "lmcompress --help / import transformers": helped / baseline,
        "what lmcompress needs of transformers, CPU s": needed,
        "import lmcompress, CPU s": imported,
        "import lmcompress / what it needs of transformers": imported / needed,
    }


def ways() -> dict[str, Any]:
    """Files and lines of the two ways, and which they are."""
    with tempfile.TemporaryDirectory() as name:
        step = step_trace(Path(name) / "run").lines()
        saving, loading = checkpoint_trace(Path(name) / "model")
    both = Trace()
    both.seen = saving.seen | loading.seen
    # the check runs the model, which says nothing of how it is saved
    forward = ("kernels/", "numerics/")
    checkpoint = {file: lines for file, lines in both.lines().items() if not file.startswith(forward)}
    return {
        "a step: files": len(step),
        "a step: lines to read": sum(step.values()),
        "save and reload: files": len(checkpoint),
        "save and reload: lines to read": sum(checkpoint.values()),
        "where": {"step": step, "save": saving.lines(), "reload": loading.lines()},
    }


BEFORE = {
    "rooms": 32,
    "imports between rooms": 170,
    "lines of a file, median": 211,
    "lines of a file, nine in ten": 509,
    "lines of a file, greatest": 1039,
    "lines of a function, median": 6,
    "lines of a function, nine in ten": 21,
    "lines of a function, greatest": 110,
    "public functions with a docstring, %": 90,
    "lines of code": 24914,
    "lines of code, of import statements": 2219,
    "lines of code, without both": 22695,
    "lmcompress --help / import transformers": 10,
}
"""What the same things were before the house was redrawn."""

ASKED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "imports that point up": ("0", lambda value: value == 0),
    "lines of a file, median": ("<= 180", lambda value: value <= 180),
    "lines of a file, nine in ten": ("<= 400", lambda value: value <= 400),
    "lines of a file, greatest": ("<= 600", lambda value: value <= 600),
    "lines of a function, median": ("<= 6", lambda value: value <= 6),
    "lines of a function, nine in ten": ("<= 21", lambda value: value <= 21),
    "lines of a function, greatest": ("<= 60", lambda value: value <= 60),
    "public functions with a docstring, %": ("100", lambda value: value == 100),
    "repeated lines, %": ("<= 0.5", lambda value: value <= 0.5),
    "lines of code": ("<= 23,000 and what is new", lambda value: value <= 23000),
    "lmcompress --help / import transformers": ("<= 1.5", lambda value: value <= 1.5),
    "import lmcompress / what it needs of transformers": ("<= 1.2", lambda value: value <= 1.2),
    "a step: files": ("<= 6", lambda value: value <= 6),
    "a step: lines to read": ("<= 750", lambda value: value <= 750),
    "save and reload: files": ("<= 6", lambda value: value <= 6),
    "save and reload: lines to read": ("<= 750", lambda value: value <= 750),
}


KNOWN = {"lines of code"}
"""Asked of the source text and known to be missed, so that ``--check`` does not stop at them."""


def number(value: float | None) -> str:
    """A number as the table has it."""
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


def table(measured: dict[str, Any]) -> str:
    """The measurements in Markdown: before, now, asked."""
    lines = ["| | before | now | asked |", "|---|---:|---:|---:|"]
    for name, value in measured.items():
        lines.append(f"| {name} | {number(BEFORE.get(name))} | {number(value)} | {ASKED.get(name, ('',))[0]} |")
    return "\n".join(lines)


def filled(page: str, measured: dict[str, Any]) -> str:
    """The page with the table in its place."""
    place = re.compile(r"(<!-- measurements -->\n).*?(<!-- /measurements -->)", re.DOTALL)
    return place.sub(lambda match: f"{match[1]}\n{table(measured)}\n\n{match[2]}", page)


def main() -> None:
    """Measure, and write the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where an asked number of the text is missed"
    )
    options = parser.parse_args()
    measured = source()
    if options.check:
        missed = [
            f"{name}: {number(measured[name])} for {ASKED[name][0]}"
            for name in measured.keys() & ASKED.keys() - KNOWN
            if not ASKED[name][1](measured[name])
        ]
        raise SystemExit("; ".join(sorted(missed)) or 0)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from common import asked, write

    measured |= times() | ways()
    where = measured.pop("where")
    print(json.dumps(measured | {"where": where}, indent=1))
    wanted = [asked(name, ASKED[name][0], measured[name], ASKED[name][1](measured[name])) for name in ASKED]
    write("architecture", [measured], wanted, quick=False, where=where)
    PAGE.write_text(filled(PAGE.read_text("utf-8"), measured), "utf-8")


if __name__ == "__main__":
    main()
