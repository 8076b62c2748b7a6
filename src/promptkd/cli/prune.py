"""Make a student of the teacher's most useful layers.

The layers are chosen by block influence (1 - cosine between a layer's input and output), measured on rows of --data; or
evenly with --choose even; or by number with --keep 0 1 5 29.

    promptkd prune --model runs/teacher --layers 15 --data train.jsonl --out student
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

LESS_MEMORY = ("a smaller --max-prompt-length (now {max_prompt_length})", "--choose even, which runs no row")


@dataclass
class Options:
    model: str
    """The teacher: a hub name, folder, run folder or GGUF file."""
    out: Path
    """Folder of the student that is made."""
    layers: int | None = None
    """How many layers to keep."""
    keep: list[int] = field(default_factory=list)
    """The layers to keep by number from 0, in place of --layers."""
    choose: Literal["influence", "even"] = "influence"
    """How to choose layers: by influence on --data, or evenly spaced."""
    data: str | None = None
    """Rows to measure the influence on: a file, folder or hub name."""
    rows: int = 64
    """How many rows to measure it on."""
    template: str = "auto"
    """auto, alpaca, chat, or a Jinja text."""
    max_prompt_length: int = 256
    """Most tokens of a prompt; rows above it are not used."""
    max_completion_length: int = 256
    """Most tokens of a response; rows above it are not used."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision to compute the influence in; auto is bfloat16 where the device has units for it."""
    trust_remote_code: bool = False
    """Run code that a hub model ships."""
    overwrite: bool = False
    """Replace the model in --out."""


def run(options: Options, training: dict[str, Any]) -> None:
    from promptkd.cli.measured_memory import say_peak
    from promptkd.cli.measuring import load_subject, precision_notes, settled_precision
    from promptkd.cli.options import merged_config
    from promptkd.cli.session import quiet_libraries, say
    from promptkd.engine import check_scoring
    from promptkd.errors import writing
    from promptkd.io.atomic import atomic
    from promptkd.models import count_parameters, load_tokenizer, model_record, prune_layers
    from promptkd.results import Metric, Results

    _check(options)
    quiet_libraries()
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    rows = _rows(options, tokenizer)
    precision = settled_precision(options.dtype) if rows else "float32"  # without rows nothing is measured
    teacher = load_subject(options.model, options.trust_remote_code)
    kept, influence = _choose(options, teacher, rows, precision)
    student = prune_layers(teacher, kept)
    check_scoring(student)
    before, after = count_parameters(teacher), count_parameters(student)
    with writing(options.out), atomic(options.out) as folder:
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        files = sorted(each.name for each in folder.iterdir())
        made = model_record(folder, student).model_copy(update={"path": str(options.out)})
        Results(
            kind="prune",
            config={**merged_config(options, {}), "kept": kept, "files": files},
            models={"teacher": model_record(options.model, teacher), "student": made},
            metrics={f"influence_{index}": Metric(value=value) for index, value in enumerate(influence)},
            notes=precision_notes(precision) if influence else [],
        ).write(folder / "results.json")
    say(f"Kept layers {', '.join(map(str, kept))}.")
    say(f"{before:,} parameters before, {after:,} after ({after / before:.0%}). The student is in {options.out}.")
    say_peak()


def _check(options: Options) -> None:
    from promptkd.cli.session import check_writable
    from promptkd.errors import check_all

    layers, out = options.layers, options.out
    is_model = out.is_dir() and out.resolve() == Path(options.model).expanduser().resolve()
    checks = [
        ((layers is None) == (not options.keep), "give either --layers N or --keep with the layers' numbers"),
        (layers is not None and layers < 1, f"--layers must be at least 1, got {layers}"),
        (
            layers is not None and options.choose == "influence" and options.data is None,
            "choosing by influence needs --data; without data use --choose even",
        ),
        (options.rows < 1, f"--rows must be at least 1, got {options.rows}"),
        (out.is_file(), f"--out must be a folder, and {out} is a file"),
        (is_model, f"--out must be another folder than --model, and both are {out}"),
        (
            not is_model and out.is_dir() and any(out.iterdir()) and not options.overwrite,
            f"{out} is not empty; replace the model in it by --overwrite or give another --out",
        ),
    ]
    check_all("Cannot prune", checks)
    check_writable(options.out.parent, options.out)
    if options.overwrite:
        _check_own(options.out)


def _check_own(out: Path) -> None:
    """Refuse to replace a folder that holds anything but what an earlier `prune` wrote, by that one's own record."""
    from promptkd.errors import RequestError
    from promptkd.results import Results

    held = {each.name for each in out.iterdir()} if out.is_dir() else set()
    record = Results.read(out / "results.json") if "results.json" in held else None
    files = record.config.get("files") if record is not None and record.kind == "prune" else None
    own = ["results.json", *map(str, files)] if isinstance(files, list) else []
    foreign = sorted(held - set(own))
    if foreign:
        raise RequestError(
            f"--overwrite replaces a student that `prune` made, but {out} holds {', '.join(foreign[:5])}, which it did "
            "not write. Move it away or give another --out."
        )


def _rows(options: Options, tokenizer: Any) -> Any:
    if options.keep or options.choose == "even" or options.data is None:
        return []
    from promptkd.data.dataset import load_rows

    data = load_rows(
        options.data,
        tokenizer,
        template=options.template,
        max_prompt_length=options.max_prompt_length,
        max_response_length=options.max_completion_length,
        limit=options.rows * 4,
    )
    return data.examples[: options.rows]


def _choose(options: Options, teacher: Any, rows: Any, precision: str) -> tuple[list[int], list[float]]:
    from promptkd.cli.measuring import computing_in
    from promptkd.data.packing import right_pad
    from promptkd.models import block_influence, evenly_spaced, most_influential
    from promptkd.models.prune import decoder_layers

    total = len(decoder_layers(teacher)[1])
    if options.keep:
        return options.keep, []
    assert options.layers is not None
    if options.choose == "even":
        return evenly_spaced(total, options.layers), []
    most_influential([0.0] * total, options.layers)  # a wrong number of layers is told before any measuring
    batches = [
        right_pad([row.prompt_ids for row in chunk], [row.response_ids for row in chunk], device=teacher.device)
        for chunk in (rows[first : first + 8] for first in range(0, len(rows), 8))
    ]
    with computing_in(precision):
        influence = block_influence(teacher, batches)
    return most_influential(influence, options.layers), influence
