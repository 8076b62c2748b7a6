"""What is checked and made before a distillation starts: rows, vocabularies, sizes, the teacher's adapter."""

import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptkd.data import EncodedData, encode_examples, examples_from_rows, read_columns, resolve_template
from promptkd.data.chat import adopt
from promptkd.data.encode import EncodedExample, Turns
from promptkd.data.kept_logits import KeptLogits
from promptkd.data.messages import without_nulls
from promptkd.data.summary import limits_named, row_notes
from promptkd.data.teacher_prompt import TeacherPrompts
from promptkd.data.templates import TRAINED_ON
from promptkd.engine import Vocabulary, check_scoring
from promptkd.errors import RequestError
from promptkd.methods import Method
from promptkd.models import SharedVocabulary, count_parameters, shared_vocabulary, vocabulary_size
from promptkd.models.adapters import TeacherAdapter
from promptkd.models.placement import is_dispatched, settle_dispatched
from promptkd.models.positions import check_positions, position_limit
from promptkd.models.vocabulary import check_heads, check_row_ids
from promptkd.responses import AdaptiveReplay
from promptkd.training.arguments import evaluation_sets
from promptkd.training.distributed import check_dispatched, check_sharding, is_sharded
from promptkd.training.kept_teacher import KeptTeacher
from promptkd.training.sampling import needs_generate
from promptkd.training.teacher import Teacher, check_teacher_options

_log = logging.getLogger(__name__)


Rows = Sequence[dict[str, Any]] | EncodedData | None


def encode(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    *,
    name: str = "train_dataset",
    turns: Turns = "last",
    need_response: bool = True,
    teacher: TeacherPrompts | None = None,
    teacher_names: Sequence[str] = ("",),
) -> EncodedData | None:
    """Rows as tokens, by the template, the columns and the limits of a `DistillConfig`; warns of what is left out.

    Of rows to validate on, responses are needed where any row has one. Iterables are gone through to their end.
    """
    trains = name == "train_dataset"
    if rows is None or isinstance(rows, EncodedData):
        if rows is not None and not trains and rows.rows < len(rows.examples):
            problem = "holds several turns of a row, and validation measures the last one"
            raise RequestError(f'{name} {problem}. Encode it with turns="last".')
        if rows is not None:
            needed = need_response and (trains or any(row.references or row.response_ids for row in rows.examples))
            _check_encoded(rows, name, need_response=needed, teacher=teacher)
        return rows_of_teachers(rows, teacher_names, name, all_used=trains)
    if isinstance(rows, Dataset | IterableDataset):
        rows = [without_nulls(row) for row in rows]  # each of its structs has the fields of all others
    flags = ("max_prompt_length =", "max_completion_length =", "max_teacher_prompt_length =")
    examples = examples_from_rows(rows, read_columns(args.columns))
    has_responses = turns == "all" or any(example.references for example in examples)
    if trains and need_response and not has_responses:
        told = (
            "No row of train_dataset has a response ('completion', 'output' or an assistant message at the end), and "
        )
        advice = "Give rows that do, or a method whose responses are the student's own, such as promptkd"
        raise RequestError(f"{told}this method learns from the data's. {advice}.")
    with limits_named(flags):
        encoded = encode_examples(
            examples,
            tokenizer,
            resolve_template(args.template, tokenizer, args.chat_template_kwargs, teacher),
            max_prompt_length=args.max_prompt_length,
            max_response_length=args.max_completion_length or 0,
            overlong=args.overlong,
            need_response=need_response and has_responses,
            turns=turns,
        )
    encoded = rows_of_teachers(encoded, teacher_names, name, all_used=trains)
    for note in row_notes(name, encoded, flags):
        _log.warning(note)
    return encoded


def _check_encoded(data: EncodedData, name: str, *, need_response: bool, teacher: TeacherPrompts | None) -> None:
    """Refuse rows that were encoded without a response that is read; warn where a context is not there."""
    silent = next((row.row for row in data.examples if not row.response_ids), None)
    if need_response and silent is not None:
        problem = f"Row {silent} of {name} was encoded without a response, which this training learns from"
        raise RequestError(f"{problem}. Encode the rows with need_response=True.")
    if teacher is not None and (teacher.text or "").strip() and not data.contexts and data.examples:
        _log.warning(f"{name} was encoded without a context of the teacher, so that teacher_prompt is not read.")


def rows_of_teachers(data: Any, names: Sequence[str], of: str, *, all_used: bool) -> Any:
    """`EncodedData` whose rows each name their teacher in the column `teacher`; as they are for a single teacher.

    `RequestError` for a row without a name or of an unknown one, and where `all_used`, for a teacher without rows.
    """
    if data is None or len(names) == 1:
        return data
    listed = ", ".join(names)
    for row in data.examples:
        if row.teacher not in names:
            got = f"the unknown teacher {row.teacher!r}" if row.teacher else "a row without the column 'teacher'"
            raise RequestError(
                f"With several teachers each row names its own in the column 'teacher', one of {listed}. Got {got} in "
                f"row {row.row} of {of}. --columns OLD=teacher takes it from another column."
            )
    unused = [name for name in names if all_used and not any(row.teacher == name for row in data.examples)]
    if unused:
        raise RequestError(f"No row of {of} is of the teacher {', '.join(unused)}. Leave it out, or give it rows.")
    return replace(data, unread={name: rows for name, rows in data.unread.items() if name != "teacher"})


def read_teacher_prompts(method: Method, args: Any) -> TeacherPrompts | None:
    """What the teacher reads beside the student's prompts, by a `DistillConfig`; None if the method reads none."""
    return TeacherPrompts(args.teacher_prompt, args.max_teacher_prompt_length) if method.reads_teacher else None


def take_template(
    args: Any, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None, name: str
) -> None:
    """With the template "teacher", give the student's tokenizer that of the teacher `name` for good."""
    if args.template == "teacher":
        if teacher is None:
            raise RequestError("--template teacher needs the teacher's tokenizer: give teacher_processing_class.")
        adopt(tokenizer, teacher, name)
        args.template = teacher.init_kwargs.get(TRAINED_ON) or "chat"


Compared = tuple[SharedVocabulary | None, list[str]]
"""The tokens on which student and teacher are compared, None if they are not, and what to say of that."""


def compared_vocabulary(
    method: Method, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None, template: str
) -> Compared:
    """The tokens that both have, by their tokenizers; without the teacher's it is taken for the same.

    `RequestError` if they share no vocabulary, or do not share the template's end, and the method reads the teacher.
    """
    if teacher is None:
        return SharedVocabulary(vocabulary_size(tokenizer)), []
    try:
        shared = shared_vocabulary(tokenizer, teacher)
        shared.check_end(resolve_template(template, tokenizer).end_token_id)
    except RequestError as error:
        return _not_compared(method, error)
    return shared, shared.notes


def compared_rows(
    method: Method, compared: Compared, train: EncodedData | None, validation: EncodedData | None
) -> Compared:
    """`compared`, unless a row uses a token of one side."""
    shared, _ = compared
    try:
        for of, rows in (("training rows", train), ("validation rows", validation)):
            if shared is not None and rows is not None:
                shared.check(rows.examples, of)
    except RequestError as error:
        return _not_compared(method, error)
    return compared


def trained_vocabulary(
    method: Method,
    shared: SharedVocabulary | None,
    tokenizer: PreTrainedTokenizerBase,
    student: nn.Module,
    teacher: nn.Module,
) -> Vocabulary:
    """What the method's distributions are over; `RequestError` if a head lacks columns for it."""
    if shared is not None:
        check_heads(shared, student=student, teacher=teacher)
    return shared if shared is not None and method.reads_teacher else Vocabulary(vocabulary_size(tokenizer))


def _not_compared(method: Method, error: RequestError) -> Compared:
    if method.reads_teacher:
        raise error
    return None, [f"The teacher, of which this method reads nothing, is not compared with the student. {error}"]


def warn_of_still_schedule(method: Method, *, validates: bool) -> None:
    """Warn of a schedule of responses that nothing would move."""
    source = method.responses
    if isinstance(source, AdaptiveReplay) and source.start == 0 and not validates:
        warnings.warn(
            "Without validation rows that have responses the student's share of the responses stays at 0: give eval "
            "rows or a student_share.",
            stacklevel=5,
        )


def check_placement(
    student: nn.Module, teacher: PreTrainedModel | KeptLogits, method: Method, args: Any, accelerator: Accelerator
) -> None:
    """Refuse models that these processes cannot train so; settle a teacher that is spread over several devices."""
    if isinstance(teacher, KeptLogits):
        check_sharding(accelerator, student, needs_generate=False, chunks=args.chunk_tokens != 0)
        return
    if {id(each) for each in student.parameters()} & {id(each) for each in teacher.parameters()}:
        raise RequestError(
            "Student and teacher share weights: neither could be frozen. Load the teacher a second time."
        )
    if args.bf16 and accelerator.device.type == "cpu" and teacher.dtype == torch.float16:
        raise RequestError(
            "A CPU that computes in bfloat16 cannot run a teacher whose weights are float16. Give --teacher_dtype "
            "bfloat16, or compute in float32 with --bf16 false."
        )
    adapter, chunks = method.adapter_class, args.chunk_tokens != 0
    by_generate = needs_generate(args) and not args.use_vllm
    check_sharding(accelerator, student, teacher, adapter=adapter, needs_generate=by_generate, chunks=chunks)
    check_dispatched(teacher, accelerator, adapter)
    if is_dispatched(teacher):
        settle_dispatched(teacher, accelerator.device)


def make_teacher(trainer: Any, teacher: Any, *, averages: bool = False, name: str = "") -> Teacher:
    """A teacher of a `DistillTrainer`: with the adapter of its method and on its devices, or what is kept of it.

    `RequestError` if a model has too few positions or columns, or cannot be run so.
    """
    method, args, accelerator, student = trainer.method, trainer.args, trainer.accelerator, trainer.model
    if isinstance(teacher, KeptLogits):
        check_heads(trainer.shared, student=student)
        check_models(student, None, None, args)
        _check_lengths("student", student, _all_rows(trainer), args)
        return KeptTeacher(teacher, args, trainer.shared)
    rows, tokenizer = _all_rows(trainer), trainer.processing_class
    rows = [row for row in rows if row.teacher == name] if name else rows
    check_row_ids("student", student, rows)
    vocabulary = trained_vocabulary(method, trainer.shared, tokenizer, student, teacher)
    parameters = count_parameters(teacher)
    adapter, adapted = make_adapter(method, teacher.requires_grad_(False), tokenizer, args, accelerator)
    check_models(student, teacher, adapter, args, rows)
    _check_lengths("student", student, rows, args)
    vectors = 0 if adapter is None else adapter.extra_positions
    _check_lengths("teacher", teacher, [row.for_teacher() for row in rows], args, vectors)
    return Teacher(adapted, adapter, accelerator, args, vocabulary, parameters, averages=averages, name=name)


def _all_rows(trainer: Any) -> list[EncodedExample]:
    """The rows that a trainer trains and validates on."""
    return [
        *(trainer.train_dataset or ()),
        *(row for rows in evaluation_sets(trainer.validation_rows).values() for row in rows),
    ]


def _check_lengths(
    role: str, model: nn.Module, rows: Sequence[EncodedExample], args: Any, soft_prompt: int = 0
) -> None:
    """Refuse rows that are too long for a model, as they may be where they came encoded, by other limits."""
    lengths = [(len(row.prompt_ids), max(len(row.response_ids), args.max_completion_length)) for row in rows]
    if lengths:
        check_positions(role, model, *max(lengths, key=sum), soft_prompt=soft_prompt)


def check_models(
    student: nn.Module,
    teacher: nn.Module | None,
    adapter: TeacherAdapter | None,
    args: Any,
    rows: Iterable[EncodedExample] = (),
) -> None:
    """Refuse models with too few positions, or that cannot be scored at given positions.

    The teacher needs them for the contexts that it reads of `rows`, too.
    """
    longest = args.max_prompt_length + args.max_completion_length
    prompt = 0 if adapter is None else adapter.extra_positions
    for name, each, extra in (("student", student, 0), ("teacher", teacher, prompt)):
        if each is None:
            continue
        limit = position_limit(each)
        if limit is not None and longest + extra > limit:
            raise RequestError(
                f"The {name} has {limit} positions. max_prompt_length + max_completion_length"
                f"{' + prompt_length' if extra else ''} is {longest + extra}; lower one of them."
            )
        check_scoring(each)
    limit = None if teacher is None else position_limit(teacher)
    others = args.max_completion_length + prompt
    context = max((len(row.teacher_prompt_ids or ()) for row in rows), default=0)
    if limit is not None and context + others > limit:
        raise RequestError(
            f"The teacher has {limit} positions. Its longest prompt, context included, + max_completion_length"
            f"{' + prompt_length' if prompt else ''} is {context + others}. Shorten the context, or leave such rows "
            f"out: --max_teacher_prompt_length {limit - others}."
        )


def check_rows(rows: int | None, args: Any) -> None:
    """Refuse fewer rows than one optimizer step takes."""
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    accumulates = args.gradient_accumulation_steps > 1
    lower = "--gradient_accumulation_steps" if accumulates else "--per_device_train_batch_size"
    if rows is not None and rows < window:
        raise RequestError(
            f"One optimizer step takes {window} rows (batch size x accumulation x processes). "
            f"Got {rows}. Lower {lower} or give more rows."
        )


def make_adapter(
    method: Method, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: Any, accelerator: Accelerator
) -> tuple[TeacherAdapter | None, nn.Module]:
    """The adapter that the method asks for, and the teacher to use with it."""
    check_teacher_options(args, method, teacher)
    if not (is_sharded(accelerator) or is_dispatched(teacher)):  # a sharded one goes there part by part
        teacher = teacher.to(accelerator.device)
    factory: Any = method.adapter
    if factory is None:
        return None, teacher
    return factory.create(teacher, tokenizer, seed=args.seed, device=accelerator.device)
