"""`promptkd prune`."""

from pathlib import Path
from typing import Any

import torch

from promptkd.cli.inference_run import InferenceRun
from promptkd.cli.options.prune import Options
from promptkd.cli.outputs import check_replaceable, check_writable, refuse_foreign
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.terminal import say
from promptkd.data import EncodedExample
from promptkd.data.batch import right_pad
from promptkd.engine import check_scoring
from promptkd.engine.backbone import embedding_device
from promptkd.errors import RequestError, check_all, writing
from promptkd.io.atomic import atomic
from promptkd.models import check_rows_fit, count_parameters, model_record
from promptkd.models.end_tokens import keep_end_tokens, known_end_tokens
from promptkd.models.folder import save_tokenizer
from promptkd.models.prune import block_influence, decoder_layers, evenly_spaced, most_influential, prune_layers
from promptkd.results import Metric, Results


def run(options: Options, training: dict[str, Any]) -> None:
    _check(options)
    job = InferenceRun(options)
    tokenizer, rows = job.load_tokenizer(options.model), []
    if not options.keep and options.choose == "influence" and options.data is not None:
        data = job.read_rows(options.data, tokenizer, options.rows * 4, options.max_completion_length)
        rows = data.examples[: options.rows]
        job.settle_precision()
    teacher = job.load_model(options.model)
    if vars(teacher).get("is_quantized", False):
        raise RequestError("A quantized model cannot be pruned: its weights are packed. Give the model before that.")
    if rows:
        check_rows_fit("model", teacher, rows, 0)
    kept, influence = _choose(job, teacher, rows)
    student = prune_layers(teacher, kept)
    check_scoring(student)
    if student.dtype.itemsize < 4:  # as a student is trained; off the device, where it may not fit beside the teacher
        student = student.to(device="cpu", dtype=torch.float32)
    keep_end_tokens(student, known_end_tokens(teacher, tokenizer))
    before, after = count_parameters(teacher), count_parameters(student)
    with writing(options.out), atomic(options.out) as folder:
        student.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        files = sorted(each.name for each in folder.iterdir())
        made = model_record(folder, student).model_copy(update={"path": str(options.out)})
        Results(
            kind="prune",
            config={**merged_config(options, {}), "kept": kept, "files": files},
            models={"teacher": model_record(options.model, teacher), "student": made},
            metrics={f"influence_{index}": Metric(value=value) for index, value in enumerate(influence)},
            notes=job.precision_notes() if influence else job.model_notes,
        ).write(folder / "results.json")
    say(f"Kept layers {', '.join(map(str, kept))}.")
    say(f"{before:,} parameters before, {after:,} after ({after / before:.0%}). The student is in {options.out}.")
    job.say_peak()


def _check(options: Options) -> None:
    layers, out = options.layers, options.out
    held = {each.name for each in out.iterdir()} if out.is_dir() else set()
    is_model = out.is_dir() and out.resolve() == Path(options.model).expanduser().resolve()
    needs_data = layers is not None and options.choose == "influence" and options.data is None
    is_taken = bool(held) and not is_model and not options.overwrite
    checks = [
        ((layers is None) == (not options.keep), "give either --layers N or --keep with the layers' numbers"),
        (needs_data, "choosing by influence needs --data; without data use --choose even"),
        (out.is_file(), f"--out must be a folder, and {out} is a file"),
        (is_model, f"--out must be another folder than --model, and both are {out}"),
        (is_taken, f"{out} is not empty; replace the model in it by --overwrite or give another --out"),
    ]
    check_all("Cannot prune", checks)
    check_replaceable(out)
    check_writable(out.parent, out)
    record = Results.read(out / "results.json") if (out / "results.json").exists() else None
    files = record.config.get("files") if record is not None and record.kind == "prune" else None
    own = {"results.json", *map(str, files)} if isinstance(files, list) else set()
    refuse_foreign(out, sorted(held - own), "a student that `prune` made", ", which it did not write")


def _choose(job: InferenceRun, teacher: Any, rows: list[EncodedExample]) -> tuple[list[int], list[float]]:
    """The layers to keep, and every layer's influence where they were chosen by it."""
    options, total = job.options, len(decoder_layers(teacher)[1])
    if options.layers is None:
        return options.keep, []
    if options.choose == "even":
        return evenly_spaced(total, options.layers), []
    most_influential([0.0] * total, options.layers)  # a wrong number of layers is told before any measuring
    prompts, responses = [row.prompt_ids for row in rows], [row.response_ids for row in rows]
    eights = [slice(first, first + 8) for first in range(0, len(rows), 8)]
    batches = [right_pad(prompts[each], responses[each], device=embedding_device(teacher)) for each in eights]
    with job.computing():
        influence = block_influence(teacher, batches)
    return most_influential(influence, options.layers), influence
