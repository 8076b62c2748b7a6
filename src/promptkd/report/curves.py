"""Names, units and groups of the figures that training logs."""

from promptkd.report.metrics import METRICS, Figure

__all__ = ["GROUPS", "LOGGED", "group_of", "logged"]


def _figure(name: str, label: str, unit: str, meaning: str, *, scale: float = 1) -> Figure:
    return Figure(name, label, label, unit, None, 3, meaning, scale)


GROUPS: dict[str, tuple[Figure, ...]] = {
    "Losses": (
        _figure("loss", "Training loss", "nats/token", "What the student's optimiser minimises."),
        _figure(
            "student_kl",
            "Student KL",
            "nats/token",
            "KL between student and (prompted) teacher on the training responses, in the method's direction.",
        ),
        _figure("student_loss", "Student loss", "nats/token", "The method's loss of the student, a token."),
        _figure("language_loss", "Language modelling", "nats/token", "Cross-entropy on the plain text."),
        _figure("prompt_kl", "Prompt KL", "nats/token", "KL between the prompted teacher and the student."),
        _figure(
            "prompt_regularizer", "Prompt regulariser", "nats/token", "KL between the prompted and the plain teacher."
        ),
        _figure("lambda", "Regulariser weight λ", "", "Weight of the regulariser; it falls to c/K."),
        _figure(
            "prompt_lag", "Prompt lag", "steps", "How many updates behind the prompt is that the student learns from."
        ),
    ),
    "Responses": (
        _figure("entropy", "Entropy", "nats/token", "Entropy of the student's next-token distribution."),
        _figure("response_length", "Response length", "tokens", "Mean length of the sampled responses."),
        _figure("student_share", "Student's share", "", "Share of the responses that the student writes (distillm)."),
        _figure("replay_size", "Replay buffer", "responses", "Responses that the replay buffer holds (distillm)."),
        _figure(
            "cut_share", "Cut at the limit", "%", "Responses that reach the length limit without an end.", scale=100
        ),
    ),
    "Norms and rates": (
        _figure("prompt_norm", "Prompt norm", "", "Norm of the soft prompt."),
        _figure("prompt_distance", "Prompt distance", "", "How far the soft prompt is from its start."),
        _figure(
            "adapter_distance", "Adapter distance", "", "How far the teacher's trained weights are from their start."
        ),
        _figure("grad_norm", "Gradient norm", "", "Of the student, before clipping."),
        _figure("prompt_grad_norm", "Prompt gradient norm", "", "Of the soft prompt, before clipping."),
        _figure("learning_rate", "Learning rate", "", "Of the student."),
        _figure("prompt_learning_rate", "Prompt learning rate", "", "Of the soft prompt."),
        _figure(
            "skipped_steps", "Skipped steps", "steps", "Moved nothing, for a loss or gradient was NaN or infinite."
        ),
        _figure("epoch", "Epoch", "", "Passes over the training rows."),
    ),
    "Time": (
        _figure("tokens_per_second", "Throughput", "tokens/s", "Prompt and response tokens trained on per second."),
        _figure("seconds_rollout", "Rollout", "s", "Seconds of a step spent on sampling responses."),
        _figure("seconds_prompt", "Prompt step", "s", "Seconds of a step spent on the soft prompt."),
        _figure("seconds_student", "Student step", "s", "Seconds of a step spent on the student."),
    ),
}
"""Known figures in the order in which they are drawn."""

LOGGED = {figure.name: figure for group in GROUPS.values() for figure in group}
_EVALUATED = "eval_"


def logged(name: str) -> Figure:
    """The figure logged under `name`; `eval_` and a metric is that metric on validation rows; others as they are."""
    if name in LOGGED:
        return LOGGED[name]
    measured = METRICS.get(name.removeprefix(_EVALUATED)) if name.startswith(_EVALUATED) else None
    if measured is None:
        return _figure(name, name, "", "")
    label = measured.label if measured.name == "loss" else f"Validation {measured.label}"
    return _figure(name, label, measured.unit, measured.meaning, scale=measured.scale)


def group_of(name: str) -> str:
    """The group that `name` is drawn in: one of `GROUPS`, "Validation" or "Other figures"."""
    for title, figures in GROUPS.items():
        if any(figure.name == name for figure in figures):
            return title
    return "Validation" if name.startswith(_EVALUATED) else "Other figures"
