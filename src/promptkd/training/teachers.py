"""Several teachers of one student: their names, which rows are whose, what they share, and how they are made ready."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from promptkd.data.encode import EncodedData, EncodedExample
from promptkd.data.kept_logits import KeptLogits
from promptkd.data.summary import context_notes, prompt_notes
from promptkd.data.templates import Template
from promptkd.errors import RequestError, at, check_all
from promptkd.evaluation.measure import has_references
from promptkd.methods import Method
from promptkd.models import SharedVocabulary
from promptkd.models.merge import forget_origin
from promptkd.models.placement import is_dispatched
from promptkd.training.arguments import template_to_save
from promptkd.training.checkpoint import whole_folder
from promptkd.training.config import student_revision
from promptkd.training.distributed import is_sharded
from promptkd.training.ends import PairEnds, SeveralEnds, generation_config
from promptkd.training.kept_teacher import check_kept_rows, check_kept_use, ends_config, kept_vocabulary
from promptkd.training.own_teacher import is_own
from promptkd.training.residence import bring, send_away
from promptkd.training.setup import (
    Compared,
    Rows,
    check_placement,
    compared_rows,
    compared_vocabulary,
    encode,
    make_teacher,
    read_teacher_prompts,
    take_template,
    warn_of_still_schedule,
)
from promptkd.training.teacher import Teacher, load_teacher
from promptkd.training.window import labeled

_LOGGER = logging.getLogger(__name__)
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Side:
    """What of a teacher is compared with the student."""

    tokenizer: PreTrainedTokenizerBase | None
    config: GenerationConfig | None


def named_teachers(given: str | Sequence[str]) -> dict[str, str]:
    """Where each teacher is, by its name: NAME=PATH, or a path whose last part is the name. The only one has none.

    `RequestError` for two of one name, and for names that a row or a folder could not bear.
    """
    teachers = [given] if isinstance(given, str) else list(given)
    if len(teachers) == 1:
        return {"": teachers[0]}
    named: dict[str, str] = {}
    for each in teachers:
        name, path = teacher_and_place(each)
        if is_own(each) or is_own(path):
            raise RequestError(f"The teacher {path} is made of the student, and can only be alone. Give one --teacher.")
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise RequestError(f"A teacher's name may hold letters, digits, '.', '_' and '-'. Got {name!r} for {path}.")
        if name in named:
            advice = f"Name them: --teacher {name}-1={named[name]} --teacher {name}-2={path}"
            raise RequestError(f"Two teachers are called {name}: {named[name]} and {path}. {advice}.")
        named[name] = path
    return named


def teacher_and_place(given: str) -> tuple[str, str]:
    """The name and the path of one of several teachers: NAME=PATH, or a path whose last part is the name."""
    name, equals, path = given.partition("=")
    return (name, path) if equals and "/" not in name and path else (Path(given).name, given)


def role_of(name: str) -> str:
    """What records call a teacher: "teacher NAME", or "teacher", of the only one."""
    return f"teacher {name}".strip()


def check_several(names: Sequence[str], args: Any, method: Method) -> None:
    """Refuse what several teachers cannot have, and what one has no use for."""
    several, adapter, resident_one = len(names) > 1, method.adapter_class, args.teachers_resident == "one"
    checks = [
        (resident_one and not several, "teachers_resident is of several teachers; there is one"),
        (several and not method.reads_teacher, "this method reads no teacher, so rows need none; give one"),
        (
            several and args.template == "teacher",
            "several teachers have several templates; name another than teacher",
        ),
        (several and resident_one and args.teacher_quantization is not None, "quantized teachers cannot take turns"),
        (
            bool(several and resident_one and adapter and adapter.copies_teacher),
            "whole teachers that are trained cannot take turns on the device; train soft prompts or LoRA weights",
        ),
    ]
    check_all("Wrong settings", checks)


def compare_sides(method: Method, args: Any, tokenizer: Any, sides: Mapping[str, Side]) -> tuple[Compared, SeveralEnds]:
    """The tokens and the ends that the student shares with each teacher; `RequestError` where teachers differ."""
    found: dict[str, Compared] = {}
    for name, side in sides.items():
        try:
            found[name] = compared_vocabulary(method, tokenizer, side.tokenizer, args.template)
        except RequestError as error:
            if not name:
                raise
            raise RequestError(f"Teacher {name}: {error}") from error
    (first, compared), *others = found.items()
    for name, (shared, _) in others:
        if shared != compared[0]:
            raise RequestError(
                f"The teachers {first} and {name} share different tokens with the student: {_count(compared[0])} and "
                f"{_count(shared)}. Give teachers of one vocabulary."
            )
    pairs = {
        name: PairEnds(args, method, compared[0], tokenizer, side.tokenizer, side.config)
        for name, side in sides.items()
    }
    return compared, SeveralEnds(pairs)


def compare_kept(kept: KeptLogits, method: Method, args: Any, tokenizer: Any) -> tuple[Compared, SeveralEnds]:
    """`compare_sides` for kept logits in the place of a teacher; `RequestError` for what they cannot tell."""
    check_kept_use(kept, method, args)
    compared = kept_vocabulary(kept, tokenizer)
    return compared, SeveralEnds({"": PairEnds(args, method, compared[0], tokenizer, None, ends_config(kept))})


def _count(shared: SharedVocabulary | None) -> str:
    return "none" if shared is None else f"{shared.size - len(shared.masked)} of {shared.size} ids"


Loaded = Mapping[str, tuple[Any, PreTrainedTokenizerBase | None, str]]
"""By name, each teacher's model, None for one made of the student, or its kept logits; its tokenizer, if known; and its
path."""


def load_teachers(
    given: Any,
    tokenizer: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None,
    args: Any,
    method: Method,
    student: tuple[str | Path | PreTrainedModel, PreTrainedTokenizerBase],
) -> Loaded:
    """One teacher, whose name is "", or several as a mapping of names; each as `load_teacher` takes it."""
    several = isinstance(given, Mapping) and len(given) > 1
    teachers = given if several else {"": next(iter(given.values())) if isinstance(given, Mapping) else given}
    check_several(tuple(teachers), args, method)
    if isinstance(tokenizer, Mapping):
        names = given.keys() if isinstance(given, Mapping) else {""}
        if unknown := sorted(tokenizer.keys() - names):
            told = f"Expected the tokenizers of {', '.join(map(repr, names))} as `teacher_processing_class`"
            raise RequestError(f"{told}. Got one of {unknown[0]!r}, which is no teacher's name.")
        tokenizer = tokenizer if several else next(iter(tokenizer.values()), None)
    loaded = {}
    for name, each in teachers.items():
        if several and is_own(each):
            raise RequestError(f"The teacher {each} is made of the student, and can only be alone. Give one teacher.")
        its = tokenizer.get(name) if isinstance(tokenizer, Mapping) else tokenizer
        model, found = load_teacher(each, its, args, method, student)
        if several and isinstance(model, KeptLogits):
            raise RequestError(f"Kept logits take the place of a single teacher. Got those of {name!r} among several.")
        loaded[name] = model, found, str(each) if isinstance(each, str | Path) else name
        if several and isinstance(model, nn.Module):
            take_turns(model, args)
    return loaded


def take_turns(model: nn.Module, args: Any) -> None:
    """Let one of several teachers wait off the device until it is needed, where they take turns."""
    if args.teachers_resident == "one":
        send_away(model, args.device)


@dataclass(frozen=True)
class PairRows:
    """The rows of a run as tokens, and what student and teacher have in common."""

    train: EncodedData | None
    validation: dict[str, EncodedData]  # by the names of its sets, of which the only one has none; empty without
    shared: SharedVocabulary | None  # None where the two are not compared
    ends: SeveralEnds
    notes: list[str]
    template: Template | None  # of the prompts to train on, which is saved with the student; None where it is not known


def prepare_rows(
    method: Method,
    args: Any,
    student: tuple[str | Path | PreTrainedModel, PreTrainedTokenizerBase],
    teachers: Loaded,
    train: Rows,
    validation: Mapping[str, Rows],
) -> PairRows:
    """Compare the vocabularies and end tokens of a student and its teachers, and encode its rows by what was found.

    Args:
        student: the model, or where it is, and its tokenizer, which takes the teacher's template or end if need be.
        validation: rows by the names of their sets.

    Raises:
        RequestError: if the method compares them and cannot, or for rows that cannot be used.
    """
    tokenizer, names, revision = student[1], tuple(teachers), student_revision(args)
    kept, _, _ = next(iter(teachers.values()))
    if isinstance(kept, KeptLogits):
        compared, ends = compare_kept(kept, method, args, tokenizer)
    else:
        sides = {}
        for name, (model, of_teacher, label) in teachers.items():
            take_template(args, tokenizer, of_teacher, label)
            sides[name] = Side(of_teacher, generation_config(student[0] if model is None else model, args, revision))
        compared, ends = compare_sides(method, args, tokenizer, sides)
    settled, (train, *sets) = ends.settle_with(student[0], [train, *validation.values()], revision)
    teacher_prompts = read_teacher_prompts(method, args)
    shown: dict[str, Any] = {"teacher": teacher_prompts, "teacher_names": names}
    encoded = encode(train, tokenizer, args, turns=args.turns, need_response=method.responses.needs_data, **shown)
    of_sets: dict[str, EncodedData] = {}
    for name, each in zip(validation, sets, strict=True):
        called = f"eval_dataset[{name!r}]" if name else "eval_dataset"
        with at(called) if name else nullcontext():
            data = encode(each, tokenizer, args, name=called, **shown)
        if data is not None:
            of_sets[name] = data
    of_validation = _joined(of_sets)
    warn_of_still_schedule(method, validates=of_validation is not None and has_references(of_validation.examples))
    shared, notes = compared_rows(method, compared, encoded, of_validation)
    if isinstance(kept, KeptLogits):
        check_kept_rows(kept, encoded, args)
    of_rows = context_notes(encoded, of_validation, teacher_prompts)
    if args.method == "opcd" and not any(each and each.contexts for each in (encoded, of_validation)):
        advice = "Give --teacher_prompt, or rows with a column teacher_prompt"
        of_rows.append(f"No row has a context for the teacher: without one, opcd is gkd with reverse KL. {advice}.")
    of_rows += prompt_notes(encoded, of_validation)
    for note in of_rows:
        _LOGGER.warning(note)
    template = template_to_save(encoded, args, tokenizer)
    return PairRows(encoded, of_sets, shared, ends, [*notes, *settled, *of_rows], template)


def _joined(sets: Mapping[str, EncodedData]) -> EncodedData | None:
    """All sets to validate on as one, for what is checked and told of their rows; None without."""
    rows, every = [row for each in sets.values() for row in each.examples], sets.values()
    template = next((each.template for each in every if each.template is not None), None)
    return EncodedData(rows, 0, informed=sum(each.informed for each in every), template=template) if sets else None


def make_teachers(trainer: Any, models: Mapping[str, Any], *, averages: bool) -> list[Teacher]:
    """The teachers of a `DistillTrainer` with their adapters, once each can be trained so."""
    several, made = len(models) > 1, []
    if several and (is_sharded(trainer.accelerator) or any(map(is_dispatched, models.values()))):
        raise RequestError(
            "Several teachers must each be whole on one device: leave FSDP2, ZeRO-3 and device_map out, or give one."
        )
    for name, model in models.items():
        if averages:
            forget_origin(model)  # from the first step on, no name leads to it
        if several:
            bring(model)
        check_placement(trainer.model, model, trainer.method, trainer.args, trainer.accelerator)
        made.append(make_teacher(trainer, model, averages=averages, name=name))
    return made


def with_rows(
    teachers: Sequence[Teacher], rows: Sequence[EncodedExample]
) -> Iterator[tuple[Teacher, Sequence[EncodedExample]]]:
    """Each teacher with its own of `rows`, the only one with all of them; teachers without any are left out."""
    for each in teachers:
        own = [row for row in rows if row.teacher == each.name] if each.name else rows
        if own:
            yield each, own


def adapter_metrics(teachers: Sequence[Teacher]) -> dict[str, float]:
    """What to log of the adapters' states."""
    found = [(each, {} if each.adapter is None else each.adapter.metrics()) for each in teachers]
    return {labeled(metric, each.name): value for each, metrics in found for metric, value in metrics.items()}


def save_adapters(teachers: Sequence[Teacher], run: Path) -> None:
    """Write what was trained of each teacher into `run`: a soft prompt into prompt, of several teachers prompt/NAME."""
    for each in teachers:
        if each.adapter is not None:
            with whole_folder(run / each.adapter.folder / each.name, writes=True) as partial:
                each.adapter.save(partial, each.model)


def teacher_models(teachers: Sequence[Teacher]) -> dict[str, nn.Module]:
    """The teachers, by what messages call them."""
    return {role_of(each.name): each.model for each in teachers}


def savings(teachers: Sequence[Teacher], args: Any) -> dict[str, bool]:
    """Which settings of any of the teachers would still save memory, for `out_of_memory.advice`."""
    found = [each.savings() for each in teachers]
    copied = any(each.adapter is not None and each.adapter.copies_teacher for each in teachers)
    stay = len(teachers) > 1 and args.teachers_resident == "all"
    turns = stay and args.teacher_quantization is None and not copied  # as `check_several` lets them
    return {name: any(each[name] for each in found) for name in found[0]} | {"take_turns": turns}


def trainable_share(teachers: Sequence[Teacher]) -> tuple[int, float]:
    """Trainable parameters of all teachers, and their share of all that these have."""
    numbers = sum(part.numel() for each in teachers if each.adapter for part in each.adapter.parameters())
    return numbers, numbers / max(sum(each.parameters for each in teachers), 1)
