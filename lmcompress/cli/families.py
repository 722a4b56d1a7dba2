"""``lmcompress families``: which model families there are, and what is proven for each."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmcompress.cli.options import AsJson
from lmcompress.errors import LmcompressError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Name = Annotated[
    str | None,
    typer.Argument(help="A family, such as llama, or a model: a folder with its config.json. Default: all families."),
]
Prove = Annotated[
    bool, typer.Option("--prove", help="Check the claims now, on tiny random models, in some seconds for each family.")
]


def families(name: Name = None, prove: Prove = False, as_json: AsJson = False) -> None:
    """List the model families that lmcompress knows, and what is proven for each.

    Every family passes the same claims on a tiny random model: masked = cut = reloaded for each part, captured features
    are the model's own, packed = fake-quantized = reloaded, with a cache = without. What a family lacks is refused, and
    the reason is given. For a family that is not described, --prove tries to find its parts.

    Examples:

      lmcompress families

      lmcompress families llama

      lmcompress families bert --prove
    """
    import json

    from lmcompress.proof.table import proven, recorded

    if not prove:
        rows = proven()
        if name is not None:
            model_type = name if name in rows else _config(name).model_type
            if model_type not in rows:
                raise LmcompressError(
                    f"the family {model_type!r} is not described{nearest(model_type, rows)}. Its weights can be "
                    "quantized, shared and stored all the same; --prove shows what else can be found out about it"
                )
            rows = {model_type: rows[model_type]}
    else:
        rows = recorded(_proofs(name, quiet=as_json))
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    _print(rows, details=name is not None)


def _proofs(name: str | None, *, quiet: bool) -> list[Any]:
    from lmcompress.cli.console import error_console
    from lmcompress.families import FAMILIES
    from lmcompress.proof import adopt, prove, typical_config

    console = error_console()
    configs = [typical_config(one) for one in FAMILIES] if name is None else [_config(name)]
    proofs = []
    for config in configs:
        with nullcontext() if quiet else console.status(f"proving {config.model_type}"):
            proofs.append(prove(config) if config.model_type in FAMILIES else adopt(config))
    return proofs


def _config(name: str) -> PretrainedConfig:
    from pathlib import Path

    from transformers import CONFIG_MAPPING, AutoConfig

    from lmcompress.proof import typical_config

    if not Path(name).is_dir() and name in CONFIG_MAPPING:
        return typical_config(name)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LmcompressError(
            f"{name} is neither a family nor a model with a config.json: {str(error).splitlines()[0]}"
        ) from error
    return config


def _print(rows: dict[str, Any], *, details: bool) -> None:
    from rich.table import Table

    from lmcompress.cli.console import output_console
    from lmcompress.proof.claims import CLAIMS
    from lmcompress.proof.table import cells

    console = output_console()
    if details:
        table = Table("claim", "holds", "reason")
        for row in rows.values():
            for claim, one in row["claims"].items():
                table.add_row(CLAIMS[claim].says, {True: "yes", False: "no", None: "–"}[one["holds"]], one["reason"])
    else:
        table = Table("family", "claims that hold", "what it lacks")
        for model_type, row in rows.items():
            held = [one["holds"] for one in row["claims"].values() if one["holds"] is not None]
            lacks = ", ".join(name for name, cell in cells(row["claims"]).items() if cell.holds is False)
            table.add_row(model_type, f"{sum(held)} of {len(held)}", lacks or "–")
    console.print(table)
    if not details:
        console.print("lmcompress families NAME gives the claims and the reasons", highlight=False)
