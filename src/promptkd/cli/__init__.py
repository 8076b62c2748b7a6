"""The command line: finds the command, runs it, and turns what happens into a message and an exit status.

A command NAME is two modules: `options/NAME.py` with `Options` (a dataclass; the docstring under a field is its help),
which imports nothing heavy, and `commands/NAME.py` with `run(options, training)`, imported when the request is sound.
The options' module may also name

- `TRAINING_CONFIG = "package.module:Class"`: a dataclass, imported late, whose fields are flags of the command too;
- `COMMON_TRAINING_FLAGS = ("learning_rate", ...)`: those that `--help` shows without that import, from the source files
  `SETTINGS_SOURCES = ("training/config.py", ...)`;
- `POSITIONAL = "runs"`: the option that takes the arguments which follow no flag;
- `LESS_MEMORY = ("a smaller --batch-size (now {batch_size})",)`: what needs less memory, with its options in braces;
- `RESUMED_BY = ("--resume",)`: the flags with which the same command resumes, if it keeps what it has done.

Exit status: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted, 143 stopped by SIGTERM.
"""

import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from promptkd.cli.openmp import let_threads_sleep
from promptkd.cli.parsing.fields import nearest
from promptkd.cli.parsing.help import command_help, overview
from promptkd.cli.signals import ended_by_signals
from promptkd.cli.terminal import is_main_process
from promptkd.errors import NO_ROOM, PromptKDError, RequestError, Stopped
from promptkd.io.redact import redacted
from promptkd.visible import shown

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, str] = {
    "demo": "Distill a small student offline on embedded defaults, with a report.",
    "prune": "Make a student of the teacher's most useful layers.",
    "sft": "Tune a model on the responses of a data set.",
    "distill": "Train a student on a teacher, with PromptKD or one of its rivals.",
    "generate": "Write a model's responses to a data set.",
    "evaluate": "Score a model's responses over several seeds.",
    "exposure-bias": "Measure how errors accumulate on a student's own continuations.",
    "judge": "Let a language model score answers, or compare two models' answers.",
    "compare": "Compare runs row by row: intervals, tests, and what each cost.",
    "report": "Make one HTML page from the results of one or several runs.",
    "chat": "Ask one or several models, their answers side by side.",
    "study": "Run methods x settings x seeds, resumable, and compare the methods.",
    "export": "Write a model as serving tools load it: GGUF or safetensors.",
}
"""Each command's name, in the order of the help: what it does."""

_LONGEST_MESSAGE = 4000
"""Characters of a failure's message that are shown: it may quote what a file holds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (by default the program's arguments) names; return the exit status."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports its use over the network unless told not to
    let_threads_sleep(os.environ)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn, or hang, when a loader forks
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a λ in the help must not fail on an ASCII terminal
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    program = f"promptkd {arguments[0]}" if arguments and arguments[0] in COMMANDS else "promptkd"
    try:
        with ended_by_signals():
            status = _dispatch(arguments)
            sys.stdout.flush()
    except (Stopped, KeyboardInterrupt, Exception) as error:
        return _report(error, program, debug)
    return status


def _report(error: BaseException, program: str, debug: bool) -> int:
    """Say on standard error what stopped the command; return the exit status."""
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        return 1
    if debug:
        traceback.print_exception(error)
    notes = vars(error).get("__notes__", [])
    if isinstance(error, Stopped | KeyboardInterrupt):
        stop = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if is_main_process():
            print(shown(redacted(" ".join([f"{program}:", str(stop), *notes]))), file=sys.stderr)
        return stop.status
    if isinstance(error, PromptKDError):
        message, status = f"{program}: {error}", error.exit_status
    elif isinstance(error, OSError) and error.errno in NO_ROOM:
        place = error.filename or "to the disk"
        message, status = " ".join([f"{program}: Cannot write {place}: {error.strerror}.", *notes]), 1
    else:
        text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        stop_mark = "" if text.endswith((".", "!", "?")) else "."
        advice = "" if debug else " Run again with --debug for the traceback."
        message, status = f"{program} failed: {text}{stop_mark}{advice}", 1
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]} … ({len(message)} characters)"
    print(shown(redacted(message)), file=sys.stderr)
    return status


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(overview(COMMANDS), end="", file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("-h", "--help", "--help-all", "--help_all"):
        return _show(overview(COMMANDS))
    if "--version" in arguments:
        from importlib.metadata import version

        return _show(f"promptkd {version('promptkd')}\n")
    if name.startswith("-"):
        raise RequestError(f"Expected a command first. Got {name}. The commands are {', '.join(COMMANDS)}.")
    if name not in COMMANDS:
        guess = nearest(name, COMMANDS)
        listed = f"The commands are {', '.join(COMMANDS)}."
        advice = f"Did you mean {guess!r}? `promptkd --help` lists the commands." if guess else listed
        raise RequestError(f"There is no command {name!r}. {advice}")
    command = importlib.import_module(f"promptkd.cli.options.{name.replace('-', '_')}")
    every_flag = "--help-all" in rest or "--help_all" in rest
    if every_flag or "--help" in rest or "-h" in rest:
        return _show(command_help(name, command, every_flag=every_flag))
    importlib.import_module("promptkd.cli.dispatch").run_command(name, command, rest)
    return 0


def _show(text: str) -> int:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # `promptkd distill --help | head` has had what it wanted
        _discard_stdout()
    return 0


def _reader_is_gone() -> bool:
    """Whether a broken pipe was standard output's (and not, say, a socket's), in which case nothing more is written."""
    try:
        print(flush=True)
    except BrokenPipeError:
        _discard_stdout()
        return True
    return False


def _discard_stdout() -> None:
    """Let the interpreter's last flush of standard output go nowhere, where it would complain of the broken pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
