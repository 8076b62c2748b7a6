"""The screen before training: what was seen, and advice where something is off. docs/warnings.md gives the reasons."""

import math

from promptkd.record_parts import Preflight
from promptkd.report.formatting import duration

CUT = 0.25  # share of the teacher's answers
ALIKE = 0.02  # nats per token between student and teacher
HIGH_LOSS = 0.5  # of log V, the loss of a model that knows nothing


def preflight_lines(seen: Preflight) -> list[tuple[str, str]]:
    """What was seen, as (name, value)."""
    teacher = "" if set(seen.teacher_ends) <= set(seen.ends) else f"; the teacher's: {_listed(seen.teacher_ends)}"
    template = "the given Jinja text" if seen.template == "jinja" else seen.template
    lines = [
        ("training data", seen.rows),
        ("template", f"{template}; assistant turns that are trained: {seen.turns}"),
        ("a response ends with", f"{_listed(seen.ends)}{teacher}"),
    ]
    if seen.kl_to_teacher is None:
        return [
            *lines,
            ("models", f"not measured: {seen.unmeasured or 'spread over processes, or of no shared vocabulary'}"),
        ]
    if seen.student_loss is not None and seen.teacher_loss is not None:
        losses = f"student {seen.student_loss:.2f}, teacher {seen.teacher_loss:.2f} nats/token"
        lines.append(("loss on the references", losses))
    context = (
        f"; the teacher reads its context in {seen.contexts} of {seen.measured_rows} rows" if seen.contexts else ""
    )
    answers = f"{seen.teacher_cut} of {seen.teacher_answers} cut at {seen.limit} tokens"
    lines += [
        ("the teacher's answers", f"{answers}, {seen.teacher_length:.0f} tokens on average"),
        (
            "KL(student || teacher)",
            f"{seen.kl_to_teacher:.2f} nats/token, {seen.kl_per_response:.1f} nats a response{context}",
        ),
        ("same top token", f"at {seen.top_overlap:.0%} of the tokens that the student writes"),
        ("measured on", f"{seen.measured_rows} rows in {duration(seen.seconds)} (--no-preflight leaves it out)"),
    ]
    return lines


def preflight_advice(seen: Preflight) -> list[str]:
    """A sentence for everything that is off, with what to do."""
    advice: list[str] = []
    if seen.kl_to_teacher is None:
        return advice
    tune = "Tune the teacher on this task first: promptkd sft --model TEACHER --data DATA"
    if seen.own_teacher:
        tune = "The teacher is the student itself. Tune that first: promptkd sft --model STUDENT --data DATA"
    if seen.teacher_loss is not None and seen.student_loss is not None:
        high = seen.teacher_loss > HIGH_LOSS * math.log(seen.vocabulary)
        not_below = not seen.own_teacher and seen.teacher_loss >= seen.student_loss
        if high or (not_below and seen.kl_to_teacher > ALIKE):  # of a pair that is nearly equal, losses are, too
            told = f"The teacher's loss on the references, {seen.teacher_loss:.2f} nats/token, is "
            told += "not below the student's" if not_below else "high"
            advice.append(f"{told}: it is not tuned for these rows. {tune}, or see that --template is the teacher's.")
    advice += _about_ends(seen, tune)
    if seen.kl_to_teacher <= ALIKE:
        told = f"Student and teacher are nearly equal already (KL {seen.kl_to_teacher:.3f} nats/token)"
        advice.append(f"{told}: there is little to learn. See that --student and --teacher are the models you mean.")
    return advice


def _about_ends(seen: Preflight, tune: str) -> list[str]:
    of_answers = f"of the teacher's {seen.teacher_answers} answers"
    cut = seen.teacher_cut >= CUT * seen.teacher_answers and seen.teacher_cut > 0
    unlike = f"{_listed(seen.ends)} ends a response here. The student would learn to go on where the teacher stops: "
    unlike += "give the --template of the teacher, or its eos_token to the student's tokenizer."
    if cut and 2 * seen.teacher_control_answers >= seen.teacher_cut:
        return [f"{seen.teacher_control_answers} {of_answers} hold {seen.teacher_control}, but {unlike}"]
    if seen.teacher_ends and not set(seen.teacher_ends) & set(seen.ends):
        return [f"The teacher ends with {_listed(seen.teacher_ends)}, but {unlike}"]
    if not cut:
        return []
    told = f"{seen.teacher_cut} {of_answers} had no end within {seen.limit} tokens"
    if seen.reference_length is not None and seen.reference_length <= seen.limit / 2:
        why = f"while references take {seen.reference_length:.0f}: it does not end its answers under this template"
        return [f"{told}, {why}. {tune}, or try another --template."]
    return [f"{told}: raise --max_completion_length, to {2 * seen.limit} say, since a cut response teaches no end."]


def _listed(tokens: list[str]) -> str:
    return " or ".join(tokens) or "no token"
