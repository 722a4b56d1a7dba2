"""``lmcompress inspect``: what a model is made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmcompress.cli.options import AnyModel, AsJson

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lmcompress.entropy_coding import StreamInfo
    from lmcompress.evaluation.size import TensorInfo
    from lmcompress.model import CompressedModel

_LEFT = ("tensor", "form", "part")


def inspect(
    model: AnyModel,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its bytes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the parts of a model: heads and widths of each block, tensors and their bytes, codes and scales of packed
    weights, bits per number of entropy-coded ones, its origin, the formats it can be saved in, the check when saved.

    Examples:

      lmcompress inspect runs/quickstart/student

      lmcompress inspect runs/quickstart/student --tensors
    """
    import json

    from lmcompress.cli.console import output_console
    from lmcompress.evaluation import size_on_disk, stream_table, tensor_table
    from lmcompress.recipes.one_model import load_compressed
    from lmcompress.recipes.progress import quiet_libraries

    with quiet_libraries():
        compressed = load_compressed(model)
        folder = Path(model) if Path(model).is_dir() else None
        entries = tensor_table(folder) if folder else []
        files = size_on_disk(folder).by_file if folder else {}
        streams = stream_table(folder) if folder else {}
    facts = compressed.report() | {
        "files": files,
        "bytes_by_part": _bytes_by_part(compressed, entries),
        "packed": _packing(compressed),
        "tensors": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.num_bytes} for t in entries],
        "saved": _saved_report(folder),
        "streams": {name: vars(info) for name, info in streams.items()},
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = output_console()
    _print_shapes(console, model, compressed, facts)
    _print_bytes(console, facts)
    if streams:
        console.print(_stream_listing(streams, each=tensors))
    if files:
        console.print("files: " + ", ".join(f"{name} {count:,}" for name, count in files.items()), highlight=False)
    if tensors:
        rows = [(t.name, t.dtype, "×".join(map(str, t.shape)), f"{t.num_bytes:,}") for t in entries]
        console.print(_table(("tensor", "dtype", "shape", "bytes"), rows))
    _print_history(console, facts)


def _saved_report(folder: Path | None) -> dict[str, Any]:
    import json

    from lmcompress.model import REPORT_FILE

    if folder is None or not (folder / REPORT_FILE).is_file():
        return {}
    saved: dict[str, Any] = json.loads((folder / REPORT_FILE).read_text("utf-8"))
    return saved


def _print_shapes(console: Console, name: str, model: CompressedModel, facts: Mapping[str, Any]) -> None:
    from lmcompress.recipes.planning import shape_in_words
    from lmcompress.reporting import shape_table

    console.print(f"[bold]{name}[/]: {facts['architecture']}, {shape_in_words(model)}", highlight=False)
    console.print(f"{facts['parameters']:,} parameters", highlight=False)
    console.print(shape_table([{"name": "heads + neurons", "blocks": facts["blocks"]}]))
    for part, what in (("heads", "attention"), ("ffn", "feed-forward network")):
        empty = [str(block.get("source", i)) for i, block in enumerate(facts["blocks"]) if not block[part]]
        if empty:
            console.print(f"no {what} left in block {', '.join(empty)}: only its bias is added", highlight=False)


def _print_bytes(console: Console, facts: Mapping[str, Any]) -> None:
    by_part, packed = facts["bytes_by_part"], facts["packed"]
    if by_part:
        total = sum(entry["bytes"] for entry in by_part.values()) or 1
        rows = [
            (part, str(entry["tensors"]), f"{entry['bytes']:,}", f"{entry['bytes'] / total:.1%}")
            for part, entry in by_part.items()
        ]
        console.print(_table(("part", "tensors", "bytes", "share"), rows, title="bytes"))
    if packed:
        names = ("codes", "embedding_codes", "scales", "dense")
        sizes = [(name.replace("_", " "), f"{packed[name]:,}") for name in names]
        console.print(_table(("tensor", "bytes"), sizes, title="packed weights"))
        console.print(
            f"{packed['bits_per_weight']:.2f} bits for each of {packed['packed_weights']:,} packed weights, scales "
            f"included; matmuls on this machine: {packed['kernel']}",
            highlight=False,
        )


def _print_history(console: Console, facts: Mapping[str, Any]) -> None:
    made = {key.replace("_", " "): value for key, value in facts["provenance"].items() if value}
    words = [f"{key}: {', '.join(value) if isinstance(value, list) else value}" for key, value in made.items()]
    console.print("provenance: " + ("; ".join(words) or "nothing recorded"), highlight=False)
    obstacle = facts["vanilla_obstacle"] or "can express these shapes (save: vanilla)"
    console.print(f"stock config: {obstacle}", highlight=False)
    if "equivalence" in facts["saved"]:
        check = facts["saved"]["equivalence"]
        console.print(
            f"round-trip check when saved: reloaded on {check['batches']} batches ({check['inputs']}), max abs "
            f"difference of outputs {check['max_error']:.3g}",
            highlight=False,
        )


def _bytes_by_part(model: CompressedModel, tensors: Sequence[TensorInfo]) -> dict[str, dict[str, int]]:
    """Bytes on disk by part of the model: embeddings, each block, and the rest."""
    from lmcompress.families import anatomy_of

    blocks, base = anatomy_of(model.model).family.blocks, model.model.base_model_prefix
    parts: dict[tuple[int, str], dict[str, int]] = {}
    for tensor in tensors:
        name = tensor.name.removeprefix(f"{base}.")
        if name.startswith(f"{blocks}."):
            number = int(name[len(blocks) + 1 :].split(".")[0])
            part = (1 + number, f"block {number}")
        elif name.startswith(("embeddings", "wte", "wpe")):
            part = (0, "embeddings")
        else:
            part = (len(tensors) + 1, "head and rest")
        entry = parts.setdefault(part, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.num_bytes
    return {part: entry for (_, part), entry in sorted(parts.items())}


def _packing(model: CompressedModel) -> dict[str, Any]:
    """Bytes of packed weights by kind, and the matmul kernel used for them; empty if all weights are dense."""
    from lmcompress.evaluation import weight_bytes
    from lmcompress.kernels.dispatch import ladder

    sizes = weight_bytes(model.model)
    if not sizes.packed_weights:
        return {}
    working = [name for name, said in ladder(model.model.device).items() if said.startswith("works")]
    return vars(sizes) | {"bits_per_weight": sizes.bits_per_weight, "kernel": working[0]}


def _stream_listing(streams: Mapping[str, StreamInfo], *, each: bool) -> Table:
    """Bits per number of entropy-coded tensors, of all and of each."""
    columns = (("dense_bytes", 8), ("fixed_bits", 1), ("huffman_bits", 1), ("bytes", 8), ("shannon_bits", 1))

    def row(name: str, form: str, infos: Collection[StreamInfo]) -> tuple[str, ...]:
        numbers = sum(info.numbers for info in infos)
        bits = [sum(getattr(info, what) * times for info in infos) / max(numbers, 1) for what, times in columns]
        return name, form, f"{numbers:,}", *(f"{value:.3f}" for value in bits)

    rows = [row(name, info.form, [info]) for name, info in streams.items()] if each else []
    names = ("tensor", "form", "numbers", "dense", "fixed width", "Huffman", "stored", "Shannon")
    title = "entropy-coded tensors, bits per number"
    return _table(names, [*rows, row("all", "", list(streams.values()))], title=title)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in (*_LEFT, "dtype", "shape") else "right")
    for row in rows:
        table.add_row(*row)
    return table
