"""One self-contained page from one or more records."""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from promptkd.errors import RequestError
from promptkd.report.context import page_context
from promptkd.report.escape import packed_json, packed_text
from promptkd.report.labels import is_teacher
from promptkd.report.sentences import listed
from promptkd.report.story import unified
from promptkd.report.tables import model_order
from promptkd.results import Results
from promptkd.visible import visible

__all__ = ["render_report"]

SCRIPTS = ("page", "unpack", "charts", "training", "bias", "distributions", "diff", "rows", "start")
"""In the order in which they stand in the page's one script."""
MOST_NAMED = 4


def render_report(records: Sequence[Results], *, title: str | None = None) -> str:
    """The report as one HTML page that needs no other file and no network. The same records give the same page.

    Every text from a record is escaped by the template engine, or reaches the page's script as packed data and the page
    from there as text. A content security policy names the page's scripts by hash, so that nothing else would run even
    if it slipped in.

    Raises `RequestError` for an empty sequence.
    """
    if not records:
        raise RequestError("Expected at least one results record to report on, got none. Name a run's folder.")
    context, data = page_context(records)
    draws = bool(data["charts"] or data["bias"] or data["browser"]["sets"])
    script = Markup(_script()) if draws else ""
    return (
        _environment()
        .get_template("page.html")
        .render(
            context,
            title=title or _title(records),
            policy=_policy([script, get_plotlyjs()] if draws else []),
            style=Markup(_own_file("style.css")),
            script=script,
            data=packed_json(data),
            plotly=_packed_plotly() if draws else "",
        )
    )


def _environment() -> Environment:
    """Escapes by default, refuses names that are missing, and shows control characters instead of emitting them."""
    return Environment(
        loader=PackageLoader("promptkd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


@cache
def _packed_plotly() -> Markup:
    """A third of Plotly's size."""
    return packed_text(get_plotlyjs())


def _script() -> str:
    files = "\n".join(_own_file(f"scripts/{name}.js") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{files}}})();\n'


def _own_file(name: str) -> str:
    return resources.files("promptkd.report").joinpath(name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """No request, no script but the page's own."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _title(records: Sequence[Results]) -> str:
    if len(records) == 1:
        return f"{records[0].kind.capitalize()} report"
    measured = model_order(unified(records))
    students = [model for model in measured if not is_teacher(model)] or measured
    if not students:
        return f"Report on {len(records)} records"
    return f"Report on {listed(students) if len(students) <= MOST_NAMED else f'{len(students)} models'}"
