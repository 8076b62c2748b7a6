"""How `promptkd judge` asks for the verdicts it lacks, and what it says meanwhile."""

import time
from collections.abc import Callable, Collection, Mapping

from promptkd.cli.terminal import progress_lines, say
from promptkd.errors import PromptKDError
from promptkd.io.jsonl import ResumableLines
from promptkd.judge.endpoint import Endpoint, Refusal, Reply, ask_all
from promptkd.judge.questions import Key, Task
from promptkd.judge.verdicts import Verdict, verdict_of
from promptkd.results import Metric


def ask_missing(
    task: Task, endpoint: Endpoint, questions: dict[Key, str], log: ResumableLines, concurrency: int
) -> None:
    """Ask what is missing from the log. Raises where an answer is missing in the end."""
    missing = {key: question for key, question in questions.items() if key not in log.lines}
    held = done = len(questions) - len(missing)
    if held:
        say(f"{held} of {len(questions)} verdicts are in {log.path} already.")
    tell = progress_lines("Judging", len(questions))

    def take(key: Key, outcome: Reply | Refusal) -> None:
        nonlocal done
        log.append([verdict_of(task, key, outcome).model_dump()])
        done += 1
        tell("verdicts", done)

    try:
        failed = ask_all(endpoint, missing, take, concurrency=concurrency, proven=held > 0, on_wait=_wait_lines())
    except PromptKDError as error:
        raise PromptKDError(f"{error} {_kept(done, log)}") from None
    if failed:
        *_, reason = failed.values()
        raise PromptKDError(
            f"{len(failed)} of {len(questions)} requests were not answered, the last for: {reason}. {_kept(done, log)}"
        )


def _kept(done: int, log: ResumableLines) -> str:
    if not done:
        return "No verdict was had."
    return f"{done} verdicts are kept in {log.path}; the same command asks for the others."


def cost_sentence(verdicts: Collection[Verdict], metrics: Mapping[str, Metric]) -> str:
    unread = sum(each.model is None for each in verdicts)
    said = f"{unread} of {len(verdicts)} verdicts could not be read"
    if not metrics:
        return f"{said}; the endpoint counts no tokens"
    spent = [f"{metrics[name].value:.0f}" for name in ("judge_prompt_tokens", "judge_completion_tokens")]
    return f"{said}; {spent[0]} prompt and {spent[1]} completion tokens"


def _wait_lines(every: float = 10.0) -> Callable[[str, float], None]:
    """A callback that says why a request waits, at most every `every` seconds."""
    last = -every

    def tell(reason: str, seconds: float) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            say(f"Asking again in {seconds:.1f} s: {reason}.")
            last = time.monotonic()

    return tell
