"""How many positions a model has, and whether rows fit them: checked before anything runs."""

from collections.abc import Sequence

from torch import nn

from promptkd.data.encode import EncodedExample
from promptkd.engine import unwrap_peft
from promptkd.errors import RequestError
from promptkd.models.vocabulary import check_row_ids

PROMPT_LIMIT = "--max_prompt_length"  # the flag that leaves out rows with long prompts
# What configurations call it: most; GPT-2 and its kin; MPT; Whisper
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")


def position_limit(model: nn.Module) -> int | None:
    """The most tokens that a row may have, by the model's configuration; None for a model without such a limit.

    A table of positions ends there. Rotary positions do not, but beyond it the model was never trained.
    """
    settings = unwrap_peft(model).config.get_text_config().to_dict()
    if settings.get("alibi") is True:  # Falcon's biases have no end, whatever its number says
        return None
    return next((settings[name] for name in _NAMES if isinstance(settings.get(name), int)), None)


def check_positions(
    role: str, model: nn.Module, prompt: int, response: int, *, soft_prompt: int = 0, limit_by: str = PROMPT_LIMIT
) -> None:
    """`RequestError` if the model has fewer positions than a prompt, a response and a soft prompt of these lengths.

    `limit_by` is the flag that leaves out rows with long prompts.
    """
    limit, needed = position_limit(model), prompt + response + soft_prompt
    if limit is None or needed <= limit:
        return
    lengths = f"a prompt of {prompt} tokens and a response of up to {response}"
    vectors = f" behind a soft prompt of {soft_prompt}" if soft_prompt else ""
    room = limit - prompt - soft_prompt
    advice = f"Lower --max_completion_length to {room}, or" if room > 0 else "Lower --max_completion_length, and"
    raise RequestError(
        f"The {role} has {limit} positions, and {needed} are needed: for {lengths}{vectors}. {advice} leave long rows "
        f"out by a lower {limit_by}."
    )


def check_rows_fit(
    role: str,
    model: nn.Module,
    rows: Sequence[EncodedExample],
    max_new_tokens: int,
    *,
    soft_prompt: int = 0,
    limit_by: str = PROMPT_LIMIT,
) -> None:
    """`check_positions` for the longest row: its prompt with its response, or with as many tokens as may be written.

    `RequestError` also for a row with a token that the model does not have.
    """
    check_row_ids(role, model, rows)
    longest = max(rows, key=lambda row: len(row.prompt_ids) + max(len(row.response_ids), max_new_tokens))
    response = max(len(longest.response_ids), max_new_tokens)
    check_positions(role, model, len(longest.prompt_ids), response, soft_prompt=soft_prompt, limit_by=limit_by)
