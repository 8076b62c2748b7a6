"""What the commands that measure share: checks, loading, labels and names of files."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptkd.cli.session import check_writable, say
from promptkd.errors import RequestError, check_all

if TYPE_CHECKING:
    import torch

    from promptkd.precision import Precision, WeightPrecision
    from promptkd.results import Training

__all__ = [
    "check_decoding",
    "check_output",
    "computing_in",
    "label_of",
    "load_subject",
    "measured_rows",
    "precision_notes",
    "settled_precision",
    "settled_rows",
    "teacher_precision_here",
    "training_cost",
    "wrong_batch_size",
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
        wrong_batch_size(options),
        (any(seed < 0 for seed in seeds), f"seeds must be 0 or more, got {_listed(seeds)}"),
        (len(set(seeds)) < len(seeds), f"each seed must be given once, got {_listed(seeds)}"),
    ]
    check_all("Cannot decode", checks)


def _listed(seeds: Sequence[int]) -> str:
    return " ".join(map(str, seeds))


def wrong_batch_size(options: Any) -> tuple[bool, str]:
    """Whether --batch-size is wrong, and the words for it."""
    size = vars(options).get("batch_size")
    return size is not None and size < 1, f"--batch-size must be at least 1, got {size}"


def settled_rows(batch_size: int | None) -> int:
    """How many rows --batch-size comes to on the device that measures: as many as in training, unless it says so."""
    from promptkd.engine import engine_for

    return engine_for(measuring_device()).decode_rows if batch_size is None else batch_size


def measuring_device() -> "torch.device":
    """The fastest device there is."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settled_precision(choice: "Precision") -> str:
    """The precision that --dtype comes to on the device that measures: float32 or bfloat16. It is said."""
    from promptkd.precision import compute_dtype

    device = measuring_device()
    name = str(compute_dtype(choice, device)).removeprefix("torch.")
    say(f"Computing in {name} on {device.type}.")
    return name


def computing_in(precision: str) -> AbstractContextManager[object]:
    """What models with float32 weights run in, to compute as `settled_precision` says."""
    import torch

    from promptkd.precision import computing

    return computing(measuring_device(), {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision])


def precision_notes(precision: str, teacher_dtype: str | None = None) -> list[str]:
    """What the record says of it; its config holds what was asked for, the same on every machine."""
    notes = [f"Computed in {precision} on {measuring_device().type}."]
    return notes if teacher_dtype is None else [*notes, f"The teacher's weights were loaded in {teacher_dtype}."]


def teacher_precision_here(choice: "WeightPrecision | None") -> "WeightPrecision":
    """The precision of a teacher's weights that --teacher-dtype comes to on the device that measures."""
    from promptkd.precision import teacher_precision

    return teacher_precision(choice, measuring_device())


def load_subject(name: str, trust_remote_code: bool, dtype: "WeightPrecision" = "float32") -> Any:
    """A model that can be scored, with weights of `dtype`, on the device that measures."""
    from promptkd.engine import check_scoring
    from promptkd.models import load_model

    model = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code).to(measuring_device())
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
