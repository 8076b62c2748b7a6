"""Make one HTML page, or tables for a paper, from the results of one or several runs.

Several records of one model (its training, its evaluations, its comparison with others) become one story.

    promptkd report runs/promptkd runs/kd promptkd-test.json kd-test.json --out report.html
    promptkd report promptkd-test.json kd-test.json --out table.md
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

POSITIONAL = "runs"
_SUFFIXES = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json", ".csv": "csv"}


@dataclass
class Options:
    runs: list[str]
    """Run folders, or results files."""
    out: Path
    """The file to write."""
    format: Literal["html", "markdown", "json", "csv"] | None = None
    """html (a page), markdown (tables), json or csv (figures); by default what the suffix of --out says."""
    title: str | None = None
    """Title of the page."""
    overwrite: bool = False
    """Replace --out."""


def run(options: Options, training: dict[str, Any]) -> None:
    from promptkd.cli.measuring import check_output
    from promptkd.cli.session import say
    from promptkd.io.atomic import write_atomic
    from promptkd.report import terminal_table
    from promptkd.results import Results

    form = options.format or _form_of(options.out)
    check_output(options.out, overwrite=options.overwrite)
    paths = [Path(name) for name in options.runs]
    records = [Results.read(path / "results.json" if path.is_dir() else path) for path in paths]
    text = _render(form, records, options.title)
    write_atomic(options.out, text)
    print(terminal_table(records))
    say(f"The {'page' if form == 'html' else 'report'} is {options.out}.")


def _form_of(out: Path) -> str:
    from promptkd.errors import RequestError

    form = _SUFFIXES.get(out.suffix.lower())
    if form is None:
        raise RequestError(
            f"The suffix of --out says the form of the report: .html, .md, .json or .csv. Got {out}. "
            "Name the form by --format html, markdown, json or csv."
        )
    return form


def _render(form: str, records: list[Any], title: str | None) -> str:
    from promptkd.report import render_csv, render_json, render_markdown, render_report

    if form == "html":
        return render_report(records, title=title)
    if form == "markdown":
        return render_markdown(records, title=title)
    return render_csv(records) if form == "csv" else render_json(records)
