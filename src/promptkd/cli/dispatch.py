"""Runs a command: reads its flags, imports it, and says what to do where memory runs out or a signal stops it."""

import importlib
import os
import shlex
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from promptkd.cli.parsing.parser import parse_options
from promptkd.errors import PromptKDError, Stopped
from promptkd.io.redact import without_secrets
from promptkd.memory import is_out_of_memory, memory_status


def run_command(name: str, command: ModuleType, arguments: Sequence[str]) -> None:
    """Run the command `name`, whose options' module is `command`."""
    parsed = parse_options(name, command, arguments)
    options, flags = parsed.options, vars(command).get("RESUMED_BY")
    try:
        importlib.import_module(f"promptkd.cli.commands.{name.replace('-', '_')}").run(options, parsed.training)
    except (Stopped, KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise PromptKDError(_out_of_memory(error, command, options)) from error
        keeps_nothing = vars(options).get("dry_run") or parsed.training.get("save_only_model")
        if flags is not None and not keeps_nothing:
            error.add_note("To resume: " + resume_command(name, without_secrets(arguments), options, flags))
        raise


def resume_command(name: str, arguments: Sequence[str], options: Any, flags: Sequence[str]) -> str:
    """The command line, for a shell, that resumes a command with these arguments; `flags` are its `RESUMED_BY`."""
    kept: list[str] = []
    is_mode = False
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument.removeprefix("--").partition("=")[0].replace("-", "_")
            is_mode = flag.removeprefix("no_") in ("resume", "overwrite")
        if not is_mode:
            kept.append(argument)
    if "--overwrite" not in flags and options.overwrite and kept == list(arguments):
        flags = [*flags, "--no-overwrite"]  # the file says to
    launcher = ["promptkd"] if os.environ.get("WORLD_SIZE", "1") == "1" else ["accelerate", "launch", "-m", "promptkd"]
    return shlex.join([*launcher, name, *kept, *flags])


def _out_of_memory(error: BaseException, command: ModuleType, options: Any) -> str:
    """What happened, and the options that need less; training explains its own steps (`training.out_of_memory`)."""
    given, batch = dict(vars(options)), ""
    if "batch_size" in given:
        inference = importlib.import_module("promptkd.cli.inference_run")  # the command has imported it
        given["batch_size"] = inference.settled_rows(given["batch_size"])
        tokens = given["max_prompt_length"] + given["max_completion_length"]
        batch = f" on up to {given['batch_size']} rows at a time, each of up to {tokens:,} tokens"
    less = [each.format(**given) for each in vars(command).get("LESS_MEMORY", ())]
    advice = f"Less is needed with {', or '.join(less)}." if less else "It takes a machine with more memory."
    kept = vars(command).get("RESUMED_BY") == ()
    resume = " What is done is kept: run the same command again to resume." if kept else ""
    return f"Out of memory{batch}. {memory_status(error)} {advice}{resume}"
