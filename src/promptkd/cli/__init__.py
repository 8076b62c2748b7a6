"""The command line: finds the command, runs it, and turns what happens into a message and an exit status.

A command NAME is two modules: `options/NAME.py` with the dataclass `Options`, which imports nothing heavy, and
`commands/NAME.py` with `run(options, training)`, imported when the request is sound. The former may also name
- `TRAINING_CONFIG = "package.module:Class"`: a dataclass, imported late, whose fields are flags of the command too;
- `COMMON_TRAINING_FLAGS`: those that `--help` shows without that import, from the source files `SETTINGS_SOURCES`;
- `POSITIONAL = "runs"`: the option, or a tuple of options, that takes the arguments which follow no flag;
- `LESS_MEMORY = ("a smaller --batch-size (now {batch_size})",)`: what needs less memory, with its options in braces;
- `RESUMED_BY = ("--resume",)`: the flags with which the same command resumes, if it keeps what it has done.

Exit status: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted, 143 stopped by SIGTERM.
"""

import importlib
import io
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from promptkd.cli.parsing.fields import nearest
from promptkd.cli.parsing.help import command_help, overview
from promptkd.cli.terminal import say
from promptkd.errors import NO_ROOM, PromptKDError, RequestError, Stopped
from promptkd.io.redact import redacted, without_secrets
from promptkd.visible import shown

COMMANDS: dict[str, str] = {  # in the order of the help
    "demo": "Distill a small student offline on embedded defaults, with a report.",
    "prune": "Make a student of the teacher's most useful layers.",
    "sft": "Tune a model on the responses of a data set.",
    "distill": "Train a student on a teacher, with PromptKD or one of its rivals.",
    "generate": "Write a model's responses to a data set.",
    "evaluate": "Score a model's responses over several seeds.",
    "exposure-bias": "Measure how errors accumulate on a student's own continuations.",
    "explain-prompt": "Show what a trained soft prompt is made of, and what it changes.",
    "judge": "Let a language model score answers, or compare two models' answers.",
    "compare": "Compare runs row by row: intervals, tests, and what each cost.",
    "report": "Make one HTML page from the results of one or several runs.",
    "chat": "Ask one or several models, their answers side by side.",
    "recipe": "List the recipes of papers, or print one.",
    "study": "Run methods x settings x seeds, resumable, and compare the methods.",
    "export": "Write a model as serving tools load it: GGUF or safetensors.",
    "publish": "Upload a finished run's student to the Hugging Face hub, with a model card.",
}
_LONGEST_MESSAGE = 4000  # characters: it may quote what a file holds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (by default the program's arguments) names; return the exit status."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports its use over the network unless told not to
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn, or hang, when a loader forks
    let_threads_sleep(os.environ)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a λ in the help must not fail on an ASCII terminal
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [argument for argument in given if argument != "--debug"]
    program = f"promptkd {arguments[0]}" if arguments and arguments[0] in COMMANDS else "promptkd"
    try:
        with _ended_by_sigterm():
            status = _dispatch(arguments)
            sys.stdout.flush()
            return status
    except (Stopped, KeyboardInterrupt, Exception) as error:
        return _report(error, program, debug=arguments != given)


def let_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Have OpenMP's threads look a thousand times for work and then sleep, unless the environment says how they wait.

    Spinning for milliseconds, the default, takes cores from others; sleeping at once halves the speed of
    decoding (docs/performance.md). torch reads the setting when it is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = "1000"


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises `Stopped`, as SIGINT raises `KeyboardInterrupt`, so that the body clears away what it began."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    before, is_main = signal.getsignal(signal.SIGTERM), threading.current_thread() is threading.main_thread()
    settable = is_main and before is not signal.SIG_IGN
    try:
        if settable:
            signal.signal(signal.SIGTERM, stop)
        yield
    finally:
        if settable:
            signal.signal(signal.SIGTERM, before)


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(overview(COMMANDS), end="", file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("-h", "--help", "--help-all", "--help_all"):
        _show(overview(COMMANDS))
        return 0
    if "--version" in arguments:
        from importlib.metadata import version

        _show(f"promptkd {version('promptkd')}\n")
        return 0
    if name.startswith("-"):
        raise RequestError(f"Expected a command first. Got {name}. The commands are {', '.join(COMMANDS)}.")
    if name not in COMMANDS:
        advice = f"The commands are {', '.join(COMMANDS)}."
        if guess := nearest(name, COMMANDS):
            advice = f"Did you mean {guess!r}? `promptkd --help` lists the commands."
        raise RequestError(f"There is no command {name!r}. {advice}")
    command = importlib.import_module(f"promptkd.cli.options.{name.replace('-', '_')}")
    every_flag = not {"--help-all", "--help_all"}.isdisjoint(rest)
    if every_flag or "--help" in rest or "-h" in rest:
        _show(command_help(name, command, every_flag=every_flag))
    else:
        _run_command(name, command, rest)
    return 0


def _run_command(name: str, command: ModuleType, arguments: Sequence[str]) -> None:
    from promptkd.cli.parsing.parser import parse_options  # reads YAML, which no help needs
    from promptkd.memory import is_out_of_memory, memory_status

    parsed = parse_options(name, command, arguments)
    options, flags = parsed.options, vars(command).get("RESUMED_BY")
    try:
        importlib.import_module(f"promptkd.cli.commands.{name.replace('-', '_')}").run(options, parsed.training)
    except (Stopped, KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise PromptKDError(_out_of_memory(memory_status(error), command, options)) from error
        keeps_nothing = vars(options).get("dry_run") or parsed.training.get("save_only_model")
        if flags is not None and not keeps_nothing and not isinstance(error, MemoryError | RuntimeError):
            error.add_note("To resume: " + resume_command(name, arguments, options, flags))
        raise


def resume_command(name: str, arguments: Sequence[str], options: Any, flags: Sequence[str]) -> str:
    """The command line, for a shell, that resumes a command with these arguments; `flags` are its `RESUMED_BY`.

    --out and --resume suffice once a run has written its settings; secrets it does not write, and a run that is to be
    replaced may still stand there.
    """
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    start = [*(["promptkd"] if is_alone else ["accelerate", "launch", "-m", "promptkd"]), name]
    shown, has_run = without_secrets(arguments), "--resume" in flags and (options.out / "config.yaml").is_file()
    if has_run and not options.overwrite and shown == [*arguments]:
        return shlex.join([*start, "--out", str(options.out), *flags])
    kept, is_mode = [], False
    for argument in shown:
        if argument.startswith("--"):
            is_mode = re.match(r"--(no[-_])?(resume|overwrite)(=|$)", argument) is not None
        if not is_mode:
            kept.append(argument)
    if "--overwrite" not in flags and options.overwrite and kept == shown:
        flags = [*flags, "--no-overwrite"]  # the file says to
    return shlex.join([*start, *kept, *flags])


def _out_of_memory(status: str, command: ModuleType, options: Any) -> str:
    """What happened, and the options that need less; training explains its own steps (`training.out_of_memory`)."""
    given, batch = dict(vars(options)), ""
    if "batch_size" in given:
        inference = importlib.import_module("promptkd.cli.inference_run")  # the command has imported it
        given["batch_size"] = inference.settled_rows(given["batch_size"])
        batch = f" on up to {given['batch_size']} rows at a time"
        if limits := [given[each] for each in ("max_prompt_length", "max_completion_length") if each in given]:
            batch += f", each of up to {sum(limits):,} tokens"
    advised = [each.format(**given) for each in vars(command).get("LESS_MEMORY", ())]
    if given.get("model_dtype", "") in (None, "float32") and given["dtype"] != "float32":
        advised.append("--model-dtype bfloat16, where its weights are in float32")
    less = ", or ".join(advised)
    advice = f"Less is needed with {less}." if less else "It takes a machine with more memory."
    is_kept = vars(command).get("RESUMED_BY") == ()
    resume = " What is done is kept: run the same command again to resume." if is_kept else ""
    return f"Out of memory{batch}. {status} {advice}{resume}"


def _report(error: BaseException, program: str, *, debug: bool) -> int:
    if isinstance(error, BrokenPipeError) and not _show("\n"):  # standard output's pipe, and not, say, a socket's
        return 1
    if debug:
        print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    notes = vars(error).get("__notes__", [])
    if isinstance(error, Stopped | KeyboardInterrupt):
        stop = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        say(" ".join([f"{program}:", str(stop), *notes]))
        return stop.status
    if isinstance(error, PromptKDError):
        message = f"{program}: {error}"
    elif isinstance(error, OSError) and error.errno in NO_ROOM:
        message = " ".join([f"{program}: Cannot write {error.filename or 'to the disk'}: {error.strerror}.", *notes])
    else:
        text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        advice = "" if debug else " Run again with --debug for the traceback."
        message = f"{program} failed: {text}{'' if text.endswith(('.', '!', '?')) else '.'}{advice}"
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]} … ({len(message)} characters)"
    print(shown(redacted(message)), file=sys.stderr)
    return error.exit_status if isinstance(error, PromptKDError) else 1


def _show(text: str) -> bool:
    """Print the text at once; return whether anyone reads it. `promptkd --help | head` has had what it wanted."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # the interpreter's last flush would complain of it: let that go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
