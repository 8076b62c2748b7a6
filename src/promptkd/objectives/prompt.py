"""The loss that tunes the soft prompt, and the schedule of its regularizer (PromptKD eqs. 2 and 3)."""

from typing import Literal, TypedDict, Unpack

from torch import Tensor

from promptkd.objectives.divergences import kl_from_log_probs, shared_log_probs

Direction = Literal["reverse", "forward"]
Schedule = Literal["linear", "constant", "none"]


class Directions(TypedDict, total=False):
    """Of the two KLs of `prompt_loss`, "reverse" by default: with the student, and with the plain teacher."""

    student_direction: Direction
    plain_direction: Direction


def prompt_loss(
    prompted_logits: Tensor,
    student_logits: Tensor,
    plain_logits: Tensor | None,
    *,
    weight: float,
    **directions: Unpack[Directions],
) -> Tensor:
    """KL(p_P || q) + λ KL(p_P || p) per token: p_P prompted teacher, q student, p plain teacher, λ = `weight`.

    Only p_P receives a gradient. The direction "forward" swaps the arguments of its term: KL(q || p_P), KL(p || p_P).
    The names follow the authors' scripts, where the prompted teacher is the model that is trained.

    Args:
        prompted_logits, student_logits, plain_logits: shape (..., V). `plain_logits` may be None when `weight` is 0.
        weight: λ_k of the step, see `regularizer_weight`.
        directions: `student_direction` and `plain_direction`, "reverse" or "forward".

    Returns:
        Shape (...), nats, float32 or wider.

    Raises:
        ValueError: for a weight without `plain_logits`, differing shapes, or an unknown direction.
    """
    if plain_logits is None and weight != 0:
        raise ValueError(f"`plain_logits` may be left out only with a weight of 0. Got {weight}.")
    to_student, to_plain = prompt_loss_terms(prompted_logits, student_logits, plain_logits, **directions)
    return to_student if to_plain is None or weight == 0 else to_student + weight * to_plain


def prompt_loss_terms(
    prompted_logits: Tensor,
    student_logits: Tensor,
    plain_logits: Tensor | None,
    *,
    student_direction: Direction = "reverse",
    plain_direction: Direction = "reverse",
) -> tuple[Tensor, Tensor | None]:
    """The two unweighted terms of `prompt_loss`; the second is None without `plain_logits`."""
    to_student = _directed_kl(prompted_logits, student_logits, student_direction)
    return to_student, None if plain_logits is None else _directed_kl(prompted_logits, plain_logits, plain_direction)


def _directed_kl(logits: Tensor, target_logits: Tensor, direction: Direction) -> Tensor:
    log_p, log_target = shared_log_probs(logits, target_logits.detach())
    if direction == "reverse":
        return kl_from_log_probs(log_p, log_target)
    if direction == "forward":
        return kl_from_log_probs(log_target, log_p)
    raise ValueError(f'A KL direction must be "reverse" or "forward". Got {direction!r}.')


def regularizer_weight(
    step: int, total_steps: int, *, coefficient: float = 1.0, schedule: Schedule = "linear"
) -> float:
    """λ_k: c (1 - k / K) for "linear", c for "constant", 0 for "none"; k counts optimizer steps from 0 to K - 1.

    "linear" begins at c and ends at c / K (PromptKD section 3.2).

    Raises:
        ValueError: if k lies outside 0 … K - 1 or the schedule is unknown.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"The step must lie in 0 … {total_steps - 1} (total_steps - 1). Got {step}.")
    shares = {"linear": 1 - step / total_steps, "constant": 1.0, "none": 0.0}
    if schedule not in shares:
        raise ValueError(f'The schedule must be "linear", "constant" or "none". Got {schedule!r}.')
    return coefficient * shares[schedule]
