"""`promptkd report`."""

from functools import partial
from pathlib import Path
from typing import Any

from promptkd.cli.options.report import Options
from promptkd.cli.outputs import check_output, check_writable
from promptkd.cli.study_comparison import is_study, study_records
from promptkd.cli.terminal import progress_lines, say
from promptkd.errors import RequestError
from promptkd.io.atomic import write_atomic
from promptkd.report import render_csv, render_json, render_latex, render_markdown, render_report, terminal_table
from promptkd.report.figures import check_figures, count_plots, write_figures
from promptkd.results import Evaluation, Results, metric_named

_FORMS = {".html": "html", ".htm": "html", ".md": "markdown", ".tex": "latex", ".json": "json", ".csv": "csv"}


def run(options: Options, training: dict[str, Any]) -> None:
    form = options.format or _FORMS.get(options.out.suffix.lower())
    if form is None:
        problem = (
            f"The suffix of --out says the form of the report: .html, .md, .tex, .json or .csv. Got {options.out}."
        )
        raise RequestError(f"{problem} Name the form by --format html, markdown, json or csv, or latex.")
    check_output(options.out, overwrite=options.overwrite)
    if options.figures is not None:
        _check_figures(options.figures, overwrite=options.overwrite)
    paths = [Path(name) for name in options.runs]
    records = [record for path in paths for record in records_of(path)]
    if options.metrics:
        records = _with_metrics(records, options.metrics)
    titled = {"html": render_report, "markdown": render_markdown, "latex": render_latex}
    if form in titled:
        text = titled[form](records, title=options.title)
    else:
        text = (render_csv if form == "csv" else render_json)(records)
    write_atomic(options.out, text)
    if options.figures is not None:
        plots = count_plots(records, every=options.figures_all)
        say(f"Drawing {'1 plot' if plots == 1 else f'{plots} plots'} into {options.figures}, as SVG and PDF each.")
        tell = partial(progress_lines("Drawing", plots), "plots")
        written = write_figures(records, options.figures, every=options.figures_all, on_plot=tell)
        say(f"{len(written)} figures are in {options.figures}.")
    print(terminal_table(records))
    say(f"The {'page' if form == 'html' else 'report'} is {options.out}.")


def _with_metrics(records: list[Results], asked: list[str]) -> list[Results]:
    """The records with the metrics that are `asked` for alone. Raises `RequestError` for one that no record holds."""
    measured = [name for record in records for each in record.evaluations for name in each.metrics]
    known = list(dict.fromkeys([*measured, *(each.metric for record in records for each in record.differences)]))
    if unknown := [name for name in asked if metric_named(name, known) is None]:
        raise RequestError(f"--metrics must be of {', '.join(known) or 'a record, which has none'}. Got {unknown[0]}.")
    kept = {metric_named(name, known) for name in asked}

    def limited(evaluation: Evaluation) -> Evaluation:
        metrics = {name: metric for name, metric in evaluation.metrics.items() if name in kept}
        return evaluation.model_copy(update={"metrics": metrics})

    return [
        record.model_copy(
            update={
                "evaluations": list(map(limited, record.evaluations)),
                "differences": [each for each in record.differences if each.metric in kept],
            }
        )
        for record in records
    ]


def _check_figures(folder: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a folder of figures that holds some or cannot be written to, and a missing library."""
    check_figures()
    if folder.is_file():
        raise RequestError(f"--figures must be a folder. {folder} is a file.")
    check_writable(folder, folder)
    held = [each.name for each in folder.iterdir() if each.suffix in (".svg", ".pdf")] if folder.is_dir() else []
    if held and not overwrite:
        raise RequestError(f"{folder} holds {held[0]}. Replace figures by --overwrite or give another --figures.")


def records_of(path: Path) -> list[Results]:
    """The record of a run's folder, with that of its explained prompt, or of a file, or those of a study's folder."""
    if path.is_dir() and is_study(path):
        return study_records(path)
    files = [path / "results.json" if path.is_dir() else path]
    explained = path / "explain-prompt" / "results.json"
    return [Results.read(each) for each in [*files, *([explained] if explained.is_file() else [])]]
