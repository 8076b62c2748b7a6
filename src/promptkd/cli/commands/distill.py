"""`promptkd distill`, and what its --dry-run prints."""

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from promptkd.cli.lora import LoraRequest
from promptkd.cli.options.distill import Options
from promptkd.cli.teacher_context import context_note, recorded_context
from promptkd.cli.terminal import is_main_process, say
from promptkd.cli.training_run import Read, TrainingRun
from promptkd.data import read_examples
from promptkd.data.kept_logits import KeptLogits
from promptkd.data.teacher_prompt import context_text
from promptkd.errors import RequestError
from promptkd.io.python_file import names_python
from promptkd.memory import gibibytes
from promptkd.methods import Method
from promptkd.methods.method_file import failure_told
from promptkd.models import count_parameters, generation_config_of
from promptkd.models.load import folder_sha256
from promptkd.report.formatting import duration
from promptkd.responses import writes_responses
from promptkd.results import Metric, ModelRecord
from promptkd.training import DistillConfig, DistillTrainer
from promptkd.training.config import chosen_method, student_revision, teacher_revision
from promptkd.training.dry_run import Trial, at_its_most, leave_nothing, longest_rows_first, take_trial_steps
from promptkd.training.kept_teacher import check_kept_rows
from promptkd.training.own_teacher import EMA, check_own_teacher, is_own, no_context_notes, told_teacher
from promptkd.training.setup import compared_rows, read_teacher_prompts, take_template
from promptkd.training.student import saves_merged
from promptkd.training.teacher import teacher_settings
from promptkd.training.teachers import (
    Side,
    check_several,
    compare_kept,
    compare_sides,
    named_teachers,
    role_of,
    take_turns,
)


def run(options: Options, training: dict[str, Any]) -> None:
    job, args, method = checked(options, training)
    with TemporaryDirectory() if options.dry_run else job.folder.locked() as place:
        if options.dry_run:
            leave_nothing(args, str(place))
        with failure_told(args.method) if names_python(args.method) else nullcontext():
            _distill(options, job, args, method, context_note(training.get("teacher_prompt")))


def checked(
    options: Options, training: dict[str, Any], read: Read = read_examples
) -> tuple[TrainingRun, DistillConfig, Method]:
    """The run, once everything that can be checked without a model is sound; nothing is written."""
    if options.dry_run and options.resume:
        raise RequestError("--dry-run looks at a run from its first step on. Leave --resume out.")
    _lora(options).check()
    if isinstance(given := training.get("teacher_prompt"), str):
        training = {**training, "teacher_prompt": context_text(given)[0]}  # which the run then keeps, not the file
    job = TrainingRun("distill", options, training, read)
    args = job.arguments(DistillConfig)
    if args.kept_logits is None and options.teacher is None:
        missing = "--teacher is missing: the teacher, a hub name, folder, run folder or GGUF file"
        raise RequestError(f"{missing}; or give its kept logits as --kept_logits.")
    if args.kept_logits is not None and options.eval_data and options.select == "kl_to_teacher":
        raise RequestError("--select kl_to_teacher needs the teacher, and with --kept_logits there is none. Give loss.")
    if args.kept_logits is not None and isinstance(options.teacher, list):
        raise RequestError("--kept_logits are those of one teacher. Leave --teacher out.")
    method = chosen_method(args, resumes=options.resume)
    check_own_teacher(options.teacher, args, method)
    check_several(tuple(named_teachers(options.teacher or "")), args, method)
    return job, args, method


def _distill(options: Options, job: TrainingRun, args: DistillConfig, method: Method, context: str) -> None:
    if context:
        job.note(context)
    kept = None if args.kept_logits is None else KeptLogits(args.kept_logits)
    own, revision = kept is None and is_own(options.teacher), student_revision(args)
    tokenizer, of_teachers = job.tokenizer(options.student, revision), teacher_revision(args, own=own)
    sides: dict[str, Side] = {}
    given = options.student if own else options.teacher or ""
    places = {"": ""} if kept else named_teachers(given)
    owner = f"{given} (the teacher's)" if args.template == "teacher" else options.student
    if kept is not None:
        compared, ends = compare_kept(kept, method, args, tokenizer)
    else:
        for name, place in places.items():
            of_teacher = tokenizer if own else job.tokenizer(place, of_teachers)
            take_template(args, tokenizer, of_teacher, place)
            of_files = {"trust_remote_code": args.trust_remote_code, "revision": of_teachers}
            sides[name] = Side(of_teacher, generation_config_of(place, **of_files))
        compared, ends = compare_sides(method, args, tokenizer, sides)
    for note in ends.settle_with(options.student, [], revision)[0]:
        job.note(note)
    needed: dict[str, Any] = {"need_response": method.responses.needs_data, "teacher_names": tuple(places)}
    train, valid = job.encode(tokenizer, args, owner, **needed, teacher=read_teacher_prompts(method, args))
    compared_rows(method, compared, train, valid)  # before models are loaded
    if kept is not None:
        check_kept_rows(kept, train, args)
        _take_kept(job, kept, options.teacher)
    for note in no_context_notes(options.teacher, args, method, train):
        job.note(note)
    lora = _lora(options)
    lora.check_model(options.student, revision)
    student = job.load("student", options.student, adapted=lora.continues)
    teachers: dict[str, Any] = {"": kept or EMA} if kept or options.teacher == EMA else {}
    for name, place in () if teachers else places.items():
        teachers[name] = job.load(role_of(name), place, teacher_settings(args, method, own=own))
        take_turns(teachers[name], args)
    if options.dry_run:
        method = at_its_most(method)
        train = longest_rows_first(train, args, method)
    tokenizers = {name: side.tokenizer for name, side in sides.items()}
    rest: dict[str, Any] = {"method": method, "teacher_processing_class": tokenizers}
    rest["peft_config"] = lora.config()
    with nullcontext() if options.dry_run else job.folder.opened():
        trainer = DistillTrainer(student, teachers, args, train, valid, tokenizer, **rest)
        if options.merge and trainer.is_sharded:
            raise RequestError("--merge needs the student's weights whole: leave it out, and merge by promptkd export.")
        for note in trainer.notes:
            job.note(note)
        if own:
            job.own_teacher(trainer, told_teacher(str(options.teacher), args))
        for name in places:
            job.results.models[role_of(name)].context = recorded_context(args.teacher_prompt, train, valid)
        if options.dry_run:
            trial = take_trial_steps(trainer)
            if is_main_process():
                print(_forecast(trainer, trial))
            return
        trainer.accelerator.wait_for_everyone()  # an older run goes once no process can refuse any more
    if not trainer.is_sharded and (told := lora.told(options.student, trainer.model)):
        job.note(told)
    numbers, share = trainer.trainable_share()
    if numbers:
        say(f"{numbers:,} parameters of the teacher are trained, {share:.4%} of its parameters.")
        job.results.metrics["teacher_trained_numbers"] = Metric(value=numbers)
        job.results.metrics["teacher_trained_share"] = Metric(value=share)
    if args.prompt_refresh == "stale":
        stale = "the student learns from the prompted teacher of before each update of the prompt"
        job.note(f"--prompt_refresh stale: {stale}. This is another algorithm than PromptKD as published.")
    if args.prompt_every > 1:
        trained = f"what is trained of the teacher moves in the first of every {args.prompt_every} steps alone"
        job.note(
            f"--prompt_every {args.prompt_every}: {trained}. This is a variant of our own, not PromptKD as published."
        )
    if options.resume:
        job.keep_preflight()
    elif options.preflight:
        job.preflight(trainer, train, own_teacher=own)
    job.train(trainer, "Distilling")
    if options.merge or saves_merged(trainer):  # then what is measured is what is saved
        trainer.merge_student()
    trainer.save_student(job.folder.path / "student")
    trainer.save_adapter(job.folder.path)
    job.record(trainer, "student")


def _take_kept(job: TrainingRun, kept: KeptLogits, given: Any) -> None:
    """Record whose logits take a teacher's place. `RequestError` if a teacher is `given` too and is another."""
    settings, folder = kept.settings, Path(given or "")
    is_another = given is not None and folder.is_dir() and folder_sha256(folder) != settings.teacher_sha256
    if is_own(given) or is_another:
        told = f"The logits in {kept.folder} are those of {settings.teacher}; --teacher {given} is another model"
        raise RequestError(f"{told}. Leave --teacher out, or keep the logits of this one.")
    job.results.models["teacher"] = ModelRecord(
        path=settings.teacher,
        parameters=settings.teacher_parameters,
        sha256=settings.teacher_sha256,
        about=f"read by its kept logits in {kept.folder}, {settings.kept} tokens of {settings.vocabulary:,} each",
    )
    told = "No teacher is loaded, so neither it nor the KL to it is measured here"
    job.note(f"{told}; promptkd evaluate --teacher measures both.")


def _lora(options: Options) -> LoraRequest:
    rank, alpha, continues = options.student_lora_rank, options.student_lora_alpha, options.student_lora_continue
    return LoraRequest(rank, alpha, continues, options.merge, "--student-lora")


def _forecast(trainer: Any, trial: Trial) -> str:
    student, kept = trainer.accelerator.unwrap_model(trainer.model), trainer.args.kept_logits
    args, (trained, _) = trainer.args, trainer.trainable_share()
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    writes = writes_responses(trainer.method.responses)
    memory = "held at the ends of phases" if trial.sampled else "the most held in each phase"
    by_size = sorted(trial.peak_memory_by_phase.items(), key=lambda each: -each[1])
    how = "on one step after one to warm up" if trial.warm else "on the run's only step"
    every, at_most = args.prompt_every, duration(trial.expected_seconds)
    between = (
        []
        if trial.seconds_between is None
        else [
            ("  without the prompt's part", f"{trial.seconds_between:.2f}, measured on one step more"),
            (
                "  on average",
                f"{trial.expected_seconds / trial.steps:.2f}, one step in {every} having the prompt's part",
            ),
        ]
    )
    lines = [
        ("student", f"{count_parameters(student, trainable=True):,} of {count_parameters(student):,} trained"),
        ("teacher", f"{trained:,} trained, {sum(each.parameters for each in trainer.teachers):,} parameters")
        if kept is None
        else ("teacher", f"none in memory, its logits in {kept}"),
        ("rows", f"{len(trainer.train_dataset):,}"),
        ("optimizer steps", f"{trial.steps:,} of {window} rows"),
        ("rollouts per step", f"up to {window}" if writes else "none, the data's responses serve"),
        (f"memory, measured on the longest rows, of up to {trial.longest_row:,} tokens; {memory}", ""),
        *((f"  {name}", gibibytes(size)) for name, size in by_size if writes or name != "rollout"),
        ("  peak", f"{gibibytes(trial.peak_memory_bytes)}, loading included"),
        ("seconds per step", f"{trial.seconds:.2f}, measured {how} with the longest rows"),
        *((f"  {name}", f"{seconds:.2f}") for name, seconds in trial.seconds_by_phase.items()),
        *between,
        ("expected time", f"at most {at_most}; loading, validation and checkpoints apart"),
    ]
    return "\n".join(f"{name:<34}{value}".rstrip() for name, value in lines)
