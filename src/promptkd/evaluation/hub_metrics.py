"""Metrics of Hugging Face's `evaluate` library, by name or from a script of one's own, one score per row."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import datasets

from promptkd.errors import PromptKDError, RequestError

_PROBE = "a short answer to try the metric on"


class HubMetric:
    """A metric that scores one answer against its references, on its own scale.

    The mean over rows is that of sentence scores: for BLEU not the BLEU of the corpus. `name` is what `evaluate.load`
    takes: "bleu", "owner/metric" (scripts that it downloads and runs, unless they are in its cache), or the path of a
    script. `NAME:FIELD` picks a field of the output ("rouge:rouge2"); by default the field with the metric's name, else
    "score", else the only number.

    Raises `RequestError` if `evaluate` is not installed, or the metric cannot be loaded, fails or gives no score.
    """

    def __init__(self, name: str) -> None:
        source, _, field = name.partition(":")
        called = Path(source).stem
        self.label = f"evaluate:{called}" + (f":{field}" if field else "")  # as `label_of_metric` says
        self.failed_on_empty = 0  # empty answers that the metric failed on; they count 0
        self._name, self._metric = name, _load(source)
        features, lists = self._metric.features, (datasets.Sequence, datasets.List, list)
        forms = features if isinstance(features, list) else [features]
        self._takes_several = any(isinstance(form.get("references"), lists) for form in forms)
        try:
            numbers = self._numbers(_PROBE, [_PROBE])
        except Exception as error:  # whatever its script raises
            told = f"The metric {name} cannot score an answer against its references: {_line(error)}"
            raise RequestError(told) from error
        wanted = [field] if field else [called, "score", *(numbers if len(numbers) == 1 else ())]
        self._field = next((each for each in wanted if each in numbers), "")
        if not self._field:
            expected = f"the field {field!r}" if field else f"a number called {called!r} or 'score', or a single number"
            got = f"got {', '.join(numbers) or 'no number'}. Pick one by NAME:FIELD."
            raise RequestError(f"The metric {name} gives no score: expected {expected}, {got}")

    def scores(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """The score of each answer; 0 for an empty one that the metric fails on, as BLEU does, else `PromptKDError`."""
        found = []
        for text, row in zip(texts, references, strict=True):
            try:
                found.append(self._numbers(text, row)[self._field])
            except Exception as error:
                if text:
                    told = f"The metric {self._name} failed on the answer {text[:60]!r}: {_line(error)}"
                    raise PromptKDError(told) from error
                self.failed_on_empty += 1
                found.append(0.0)
        return found

    def check(self, references: Iterable[Sequence[str]]) -> None:
        """Raise `RequestError` if a row has several references and the metric takes a single one."""
        most = max(map(len, references))
        if most > 1 and not self._takes_several:
            told = f"The metric {self._name} takes one reference per row, and one row has {most}."
            raise RequestError(f"{told} Leave it out here.")

    def _numbers(self, text: str, references: Sequence[str]) -> dict[str, float]:
        """The metric's output for one row: every field that is a number, or a list with a single one."""
        given = list(references) if self._takes_several else references[0]
        output = self._metric.compute(predictions=[text], references=[given])
        fields = output.items() if isinstance(output, Mapping) else ()
        single = {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in fields}
        return {key: float(value) for key, value in single.items() if isinstance(value, Real)}


def _load(source: str) -> Any:
    try:
        import evaluate  # an extra
    except ImportError as error:
        told = "Metrics by name need Hugging Face's `evaluate`. Install it: pip install 'promptkd[metrics]'."
        raise RequestError(told) from error
    try:
        return evaluate.load(source, keep_in_memory=True)
    except Exception as error:  # a script that is run to be loaded, or the network
        told = f"Could not load the metric {source}: {_line(error)} Give the name of a metric of Hugging Face's"
        told += " `evaluate` (offline, one that its cache holds) or the path of a metric script."
        raise RequestError(told) from error


def _line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:300] if text.endswith(".") else f"{text[:300]}."
