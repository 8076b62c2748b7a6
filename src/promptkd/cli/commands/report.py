"""`promptkd report`."""

from pathlib import Path
from typing import Any

from promptkd.cli.option_checks import check_output
from promptkd.cli.options.report import Options
from promptkd.cli.terminal import say
from promptkd.errors import RequestError
from promptkd.io.atomic import write_atomic
from promptkd.report import render_csv, render_json, render_markdown, render_report, terminal_table
from promptkd.results import Results

_SUFFIXES = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json", ".csv": "csv"}


def run(options: Options, training: dict[str, Any]) -> None:
    form = options.format or _form_of(options.out)
    check_output(options.out, overwrite=options.overwrite)
    paths = [Path(name) for name in options.runs]
    records = [Results.read(path / "results.json" if path.is_dir() else path) for path in paths]
    text = _render(form, records, options.title)
    write_atomic(options.out, text)
    print(terminal_table(records))
    say(f"The {'page' if form == 'html' else 'report'} is {options.out}.")


def _form_of(out: Path) -> str:
    form = _SUFFIXES.get(out.suffix.lower())
    if form is None:
        raise RequestError(
            f"The suffix of --out says the form of the report: .html, .md, .json or .csv. Got {out}. "
            "Name the form by --format html, markdown, json or csv."
        )
    return form


def _render(form: str, records: list[Any], title: str | None) -> str:
    if form == "html":
        return render_report(records, title=title)
    if form == "markdown":
        return render_markdown(records, title=title)
    return render_csv(records) if form == "csv" else render_json(records)
