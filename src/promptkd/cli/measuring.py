"""What the commands that measure share: checks, loading, labels and names of files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptkd.cli.session import check_writable
from promptkd.errors import RequestError

if TYPE_CHECKING:
    from promptkd.results import Training

__all__ = [
    "check_decoding",
    "check_output",
    "label_of",
    "load_subject",
    "measured_rows",
    "training_cost",
]

MOST_TOKENS = 1_000_000
"""Of a response. Buffers have room for as many."""


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder, a file that exists already, or a place that cannot be written to, before any work."""
    if path.is_dir():
        raise RequestError(f"--out must be a file. {path} is a folder.")
    if path.exists() and not overwrite:
        raise RequestError(f"{path} exists. Replace it by --overwrite or give another --out.")
    check_writable(path.parent, path)


def check_decoding(options: Any, seeds: Sequence[int]) -> None:
    """Refuse settings with which nothing can be decoded, all at once and before any model is loaded."""
    checks = [
        (options.temperature < 0, f"--temperature must be 0 (greedy) or more, got {options.temperature}"),
        (not 0 < options.top_p <= 1, f"--top-p must lie above 0 and at most at 1, got {options.top_p}"),
        (options.top_k < 0, f"--top-k must be 0 (off) or more, got {options.top_k}"),
        (
            options.max_completion_length < 1,
            f"--max-completion-length must be at least 1 token, got {options.max_completion_length}",
        ),
        (
            options.max_completion_length > MOST_TOKENS,
            f"--max-completion-length must be at most {MOST_TOKENS}, got {options.max_completion_length}",
        ),
        (options.batch_size < 1, f"--batch-size must be at least 1, got {options.batch_size}"),
        (any(seed < 0 for seed in seeds), f"seeds must be 0 or more, got {_listed(seeds)}"),
        (len(set(seeds)) < len(seeds), f"each seed must be given once, got {_listed(seeds)}"),
    ]
    problems = [text for wrong, text in checks if wrong]
    if problems:
        raise RequestError("Cannot decode: " + "; ".join(problems) + ".")


def _listed(seeds: Sequence[int]) -> str:
    return " ".join(map(str, seeds))


def load_subject(name: str, trust_remote_code: bool) -> Any:
    """A model that can be scored, on the fastest device there is."""
    import torch

    from promptkd.engine import check_scoring
    from promptkd.models import load_model

    model = load_model(name, trust_remote_code=trust_remote_code)
    if torch.cuda.is_available():
        model = model.to("cuda")
    check_scoring(model)
    return model


def measured_rows(
    options: Any, source: str, tokenizer: Any, *, need_response: bool = True, max_reference_length: int | None = None
) -> Any:
    """The rows of one data set, encoded as the options say; a reference has a response's limit unless one is given."""
    from promptkd.data.dataset import load_rows

    return load_rows(
        source,
        tokenizer,
        template=options.template,
        max_prompt_length=options.max_prompt_length,
        max_response_length=options.max_completion_length if max_reference_length is None else max_reference_length,
        need_response=need_response,
        limit=options.limit,
    )


def label_of(path: str, among: Sequence[str] = ()) -> str:
    """A short name: the last part of the path without its suffix, or the whole path where that would be ambiguous."""
    from promptkd.data.sources import SUFFIXES

    name = Path(path).name
    suffix = next((each for each in (*SUFFIXES, ".gguf") if name.lower().endswith(each)), "")  # not Qwen2.5's
    short = name[: len(name) - len(suffix)] or path
    alike = [each for each in among if each != path and label_of(each) == short]
    return path if alike else short


def training_cost(model: str) -> "Training | None":
    """What the training of `model` cost, if it is a run's folder whose record says so."""
    from promptkd.results import Results

    folder = Path(model).expanduser()
    if not (folder / "config.yaml").is_file() or not (folder / "results.json").is_file():
        return None
    known = Results.read(folder / "results.json").training
    return next(iter(known.values())) if len(known) == 1 else known.get(label_of(model))
