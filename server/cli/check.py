"""`vlmserve check MODEL`: what a checkpoint is and on which GPUs it fits, without loading it.

Owns the tables; models/memory/fit_report.py does the arithmetic in a child, because this process
imports no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ...models.settings.byte_text import shown_bytes
from .model_source import ModelFilesError, resolve_model

REPORT_MODULE = "vlmserve.models.memory.fit_report"
WIDTH = 120
CONTENTS = {"string": "strings", "openai": "lists of parts", "both": "strings or lists of parts"}
NAMES = {None: "none", "int4": "4-bit checkpoint"}


def check(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id. Default: the bundled model.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a checkpoint is, what it takes in memory and which GPUs it fits.

    Reads headers, not weights. Downloads a hub id first.
    """
    try:
        folder = resolve_model(model, revision).path
        report = fit_report(folder) | {
            **template_form(folder),
            "grammars": why_no_grammars(folder),
        }
    except ModelFilesError as error:
        typer.echo(f"vlmserve: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(report))
    else:
        show(report, Console(width=WIDTH))


def fit_report(folder: Path) -> dict[str, Any]:
    """The report of a child process. Raises ModelFilesError, one line."""
    command = [sys.executable, "-m", REPORT_MODULE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["the check ended without a message"]
        raise ModelFilesError(lines[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def template_form(folder: Path) -> dict[str, str | None]:
    """Where the chat template is, and how it reads contents; None without one.

    Raises ModelFilesError if its file cannot be read or is no template.
    """
    from ..prompts.chat_template import ChatTemplate
    from ..prompts.templates.sources import special_tokens, template_sources

    try:
        if (sources := template_sources(folder)) is None:
            return {"template": None, "content_format": None}
        template = ChatTemplate(sources.default, special_tokens(folder))
    except ValueError as error:
        raise ModelFilesError(str(error)) from error
    return {"template": sources.origin, "content_format": template.content_format}


def why_no_grammars(folder: Path) -> str | None:
    """Why requests with a grammar are rejected; None: they are served."""
    from ...models.grammar import Grammars

    return Grammars(folder, vocab_size=0).unsupported


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report as two tables."""
    count = report["parameters"]
    size = f"{count / 1e9:.1f} B" if count >= 1e8 else f"{count / 1e6:.1f} M"
    console.print(f"model     {report['model']}", soft_wrap=True, highlight=False)
    facts = f"Mllama, {size} parameters, {report['layers']} text layers, context "
    console.print(f"is        {facts}{report['context']:,}", highlight=False)
    console.print(f"weights   {report['stored']}", soft_wrap=True, highlight=False)
    console.print(f"template  {shown_template(report)}", highlight=False)
    if report["grammars"] is not None:
        console.print(f"grammars  none: {report['grammars']}", soft_wrap=True, highlight=False)
    gpus = [gpu["gb"] for gpu in report["rows"][0]["gpus"]]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("--quantize", "weights", *(f"{gb} GB" for gb in gpus)):
        table.add_column(name, justify="right" if name != "--quantize" else "left", no_wrap=True)
    for row in report["rows"]:
        name = NAMES.get(row["quantize"], row["quantize"])
        table.add_row(name, shown_bytes(row["weights"]), *map(cell, row["gpus"]))
    console.print(table)
    images = {name: shown_bytes(size) for name, size in report["image_bytes"].items()}
    console.print(
        f"A cached image of the most tiles takes {images['auto']}, and {images['int8']} with "
        "--image-cache-dtype int8.",
        highlight=False,
    )
    console.print(
        "Each GPU: longest context in tokens + cached images of the most tiles; -: does not fit. "
        "By arithmetic, in bfloat16, with the default options and 90 % of the GPU's memory.",
        highlight=False,
    )


def shown_template(report: dict[str, Any]) -> str:
    """The template in words."""
    if report["template"] is None:
        return "none: Meta's format of Llama 3.2 is used"
    return f"{report['template']}, contents as {CONTENTS[report['content_format']]}"


def cell(gpu: dict[str, Any]) -> str:
    """The room of one GPU."""
    return "-" if gpu["context"] is None else f"{gpu['context']:,} + {gpu['images']:,}"
