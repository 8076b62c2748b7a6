"""`promptkd report`."""

from pathlib import Path
from typing import Any

from promptkd.cli.options.report import Options
from promptkd.cli.outputs import check_output
from promptkd.cli.terminal import say
from promptkd.errors import RequestError
from promptkd.io.atomic import write_atomic
from promptkd.report import render_csv, render_json, render_markdown, render_report, terminal_table
from promptkd.results import Results

_FORMS = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json", ".csv": "csv"}


def run(options: Options, training: dict[str, Any]) -> None:
    form = options.format or _FORMS.get(options.out.suffix.lower())
    if form is None:
        raise RequestError(
            f"The suffix of --out says the form of the report: .html, .md, .json or .csv. Got {options.out}. "
            "Name the form by --format html, markdown, json or csv."
        )
    check_output(options.out, overwrite=options.overwrite)
    paths = [Path(name) for name in options.runs]
    records = [Results.read(path / "results.json" if path.is_dir() else path) for path in paths]
    if form in ("html", "markdown"):
        text = (render_report if form == "html" else render_markdown)(records, title=options.title)
    else:
        text = (render_csv if form == "csv" else render_json)(records)
    write_atomic(options.out, text)
    print(terminal_table(records))
    say(f"The {'page' if form == 'html' else 'report'} is {options.out}.")
