"""Metrics of one's own: a plain function `score(prediction, references) -> float` in a Python file."""

import ast
import math
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path

from promptkd.errors import PromptKDError, RequestError
from promptkd.evaluation.hub_metrics import HubMetric
from promptkd.io.python_file import load_python, names_python, own_code, python_file

_PROBE = "a short answer to try the metric on"
_DIRECTIONS = ("higher", "lower")


class FunctionMetric:
    """A function of FILE.py:NAME that scores an answer against its references.

    More is better, unless the function has an attribute `better = "lower"`. The label in records, "own:NAME" or
    "own-lower:NAME", says so. Raises `RequestError` for a file or function that fails, also on a row made up to try it.
    """

    failed_on_empty = 0  # it must score an empty answer too

    def __init__(self, spec: str) -> None:
        self._spec, self._file = spec, python_file(spec)
        self._function = load_python(spec, "a function score(prediction, references) -> float")
        if not callable(self._function):
            raise RequestError(f"{spec} must be a function score(prediction, references) -> float. It is none.")
        better = vars(self._function).get("better", "higher")
        if better not in _DIRECTIONS:
            raise RequestError(f'{spec}: its attribute `better` must be "higher" or "lower". Got {better!r}.')
        name = spec.rpartition(":")[2]
        self.label = f"own:{name}" if better == "higher" else f"own-lower:{name}"
        for answer in (_PROBE, ""):
            with own_code(f"The metric {spec} failed on a row that it was tried on", self._file):
                self._score(answer, [_PROBE])

    def scores(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """The score of each answer. Raises `PromptKDError` with the row that the function fails on."""
        found = []
        for row, (text, known) in enumerate(zip(texts, references, strict=True)):
            try:
                found.append(self._score(text, list(known)))
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                told = f"The metric {self._spec} failed on answer {row}, {text[:60]!r}: {reason}"
                raise PromptKDError(told) from error
        return found

    def check(self, references: Iterable[Sequence[str]]) -> None:
        """Try it on the first row, with its own references. Raises `RequestError` if it fails."""
        first = next(iter(references), None)
        if first is not None:
            with own_code(f"The metric {self._spec} failed on the references of the first row", self._file):
                self._score(_PROBE, list(first))

    def _score(self, answer: str, references: list[str]) -> float:
        value = self._function(answer, references)
        if not isinstance(value, Real) or not math.isfinite(float(value)):
            raise TypeError(f"expected a finite number as the score, got {value!r:.80}")
        return float(value)


Metric = HubMetric | FunctionMetric


def load_metrics(names: Sequence[str]) -> list[Metric]:
    """The metric of each name: a function of FILE.py:NAME, else one of `evaluate`. `RequestError` as these raise."""
    metrics: list[Metric] = [FunctionMetric(name) if _is_function(name) else HubMetric(name) for name in names]
    labels = [each.label for each in metrics]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise RequestError(f"Each metric must have a name of its own. Got {', '.join(twice)} twice.")
    return metrics


def label_of_metric(name: str) -> str:
    """What records call the metric that `--metrics` names; a file of one's own is run to know."""
    if _is_function(name):
        return FunctionMetric(name).label
    source, _, wanted = name.partition(":")
    return f"evaluate:{Path(source).stem}" + (f":{wanted}" if wanted else "")


def _is_function(name: str) -> bool:
    """Whether FILE.py:NAME is a function of the file, and not a field of the `evaluate.Metric` that the file holds."""
    if not names_python(name):
        return False
    file = python_file(name)
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return True  # and is told when it is loaded
    bases = [ast.unparse(base) for each in ast.walk(tree) if isinstance(each, ast.ClassDef) for base in each.bases]
    return not any(base.rpartition(".")[2] == "Metric" for base in bases)
