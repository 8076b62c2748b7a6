"""`promptkd prune`."""

from pathlib import Path
from typing import Any

from promptkd.cli.library_logging import quiet_libraries
from promptkd.cli.measuring_device import computing_in, load_subject, precision_notes, say_peak, settled_precision
from promptkd.cli.option_checks import check_writable
from promptkd.cli.options.prune import Options
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.terminal import say
from promptkd.data import encode_examples, read_examples
from promptkd.data.batch import right_pad
from promptkd.engine import check_scoring
from promptkd.errors import RequestError, check_all, writing
from promptkd.io.atomic import atomic
from promptkd.models import (
    block_influence,
    count_parameters,
    evenly_spaced,
    load_tokenizer,
    model_record,
    most_influential,
    prune_layers,
)
from promptkd.models.prune import decoder_layers
from promptkd.results import Metric, Results


def run(options: Options, training: dict[str, Any]) -> None:
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
    layers, out = options.layers, options.out
    is_model = out.is_dir() and out.resolve() == Path(options.model).expanduser().resolve()
    checks = [
        ((layers is None) == (not options.keep), "give either --layers N or --keep with the layers' numbers"),
        (
            layers is not None and options.choose == "influence" and options.data is None,
            "choosing by influence needs --data; without data use --choose even",
        ),
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

    data = encode_examples(
        read_examples(options.data, limit=options.rows * 4),
        tokenizer,
        options.template,
        max_prompt_length=options.max_prompt_length,
        max_response_length=options.max_completion_length,
    )
    return data.examples[: options.rows]


def _choose(options: Options, teacher: Any, rows: Any, precision: str) -> tuple[list[int], list[float]]:
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
