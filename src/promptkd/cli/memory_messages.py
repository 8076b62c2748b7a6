"""What a command says of the memory that it held, and of memory that it did not get."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from promptkd.errors import PromptKDError
from promptkd.memory import gibibytes, is_out_of_memory, memory_status


def told_peak(peak: int, by_phase: Mapping[str, int], *, sampled: bool = False) -> str:
    """The peak as a sentence, by phase where phases are known, the largest first.

    Args:
        sampled: whether the phases' peaks are what was held at their ends.
    """
    if not by_phase:
        return f"Peak memory {gibibytes(peak)}."
    by_size = sorted(by_phase.items(), key=lambda each: each[1], reverse=True)
    phases = ", ".join(f"{name} {gibibytes(size)}" for name, size in by_size)
    return f"Peak memory {gibibytes(peak)} ({'at the ends of phases: ' if sampled else ''}{phases})."


@contextmanager
def out_of_memory_told(command: ModuleType, options: Any, resume: str = "") -> Iterator[None]:
    """Turn what an allocator raises in the body into a `PromptKDError` that names the options that need less.

    Training tells of its own steps (`promptkd.training.out_of_memory`); this tells of all other work of a command.

    Args:
        command: its module. `LESS_MEMORY` holds the settings that need less, with its options in braces.
        resume: how to go on with what is done already, as a sentence.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        given = _settled(vars(options))
        less = [each.format(**given) for each in vars(command).get("LESS_MEMORY", ())]
        advice = f"Less is needed with {', or '.join(less)}." if less else "It takes a machine with more memory."
        told = [f"Out of memory{_batch(given)}.", memory_status(error), advice, resume]
        raise PromptKDError(" ".join(part for part in told if part)) from error


def _settled(given: dict[str, Any]) -> dict[str, Any]:
    """The options, a batch size that was left out as it was chosen."""
    if "batch_size" not in given:
        return given

    from promptkd.cli.measuring_device import settled_rows

    return given | {"batch_size": settled_rows(given["batch_size"])}


def _batch(given: dict[str, Any]) -> str:
    """What a command that decodes works on at a time, by its options."""
    if "batch_size" not in given:
        return ""
    tokens = given["max_prompt_length"] + given["max_completion_length"]
    return f" on up to {given['batch_size']} rows at a time, each of up to {tokens:,} tokens"
