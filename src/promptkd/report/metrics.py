"""What every metric is called, its unit, and which direction is better: of evaluations, and of training's log."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from promptkd.results import Better


@dataclass(frozen=True, slots=True)
class MetricInfo:
    name: str
    label: str  # column heading
    phrase: str  # the same inside a sentence
    unit: str = ""
    better: Better | None = None
    decimals: int = 3
    meaning: str = ""
    scale: float = 1  # the recorded value times this is in `unit`
    signed: bool = False  # it may lie below 0
    yes: float | None = None  # of a score that is yes or no for one row: the recorded value of a yes

    @property
    def difference_unit(self) -> str:
        return {"%": "percentage points", "of 100": "points"}.get(self.unit, self.unit)

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which recorded values it lies by its definition; infinite where nothing is known."""
        if self.unit in ("of 100", "of 10"):
            return (0, 100) if self.unit == "of 100" else (1, 10)
        if self.unit == "%" and self.scale == 100:
            return 0, 1
        return (0 if self.name in METRICS and not self.signed else -math.inf), math.inf


# fmt: off
_MEASURED = (
    MetricInfo("loss", "Loss on references", "loss on the references", "nats/token", "lower", 2,
               "Mean negative log-likelihood of the reference answers, given the request."),
    MetricInfo("kl_to_teacher", "KL to the teacher", "KL to the teacher", "nats/token", "lower", 2,
               "KL(student‖teacher) on answers sampled from the student: 0 is a perfect copy of the teacher."),
    MetricInfo("rouge_l", "ROUGE-L", "ROUGE-L", "of 100", "higher", 1,
               "Longest common subsequence of answer and reference as an F score, the best over references."),
    MetricInfo("rouge_1", "ROUGE-1", "ROUGE-1", "of 100", "higher", 1,
               "Words that answer and reference have in common as an F score, the best over references."),
    MetricInfo("exact_match", "Exact match", "exact match", "of 100", "higher", 1,
               "Share of answers that equal a reference after normalization.", yes=100),
    MetricInfo("eos_share", "Ends by itself", "share of answers that end by themselves", "%", "higher", 0,
               "Share of answers with an end-of-response token before the length limit.", scale=100, yes=1),
    MetricInfo("cut_share", "Cut at the limit", "share of answers cut at the limit", "%", "lower", 0,
               "Share of answers that reach the length limit without an end.", scale=100, yes=1),
    MetricInfo("response_length", "Answer length", "answer length", "tokens", None, 1,
               "Mean length of the answers; longer is neither better nor worse."),
    MetricInfo("length_ratio", "Length to reference", "length against the references", "", None, 2,
               "Tokens of all answers over tokens of all references; 1 is as long as the references."),
    MetricInfo("distinct_1", "Distinct-1", "share of distinct tokens", "%", None, 0,
               "Distinct tokens over all tokens of an answer: low where it repeats itself.", scale=100),
    MetricInfo("distinct_2", "Distinct-2", "share of distinct token pairs", "%", None, 0,
               "Distinct pairs of adjacent tokens over all pairs of an answer: low where it repeats itself.",
               scale=100),
    MetricInfo("exposure_bias", "ExAccErr", "exposure bias", "%", "lower", 1,
               "Excess of the errors accumulated on the student's own text over those on the teacher's, at one length.",
               signed=True),
    MetricInfo("judge_ratio", "Judge's ratio", "ratio of the judge's scores to the reference's", "%", "higher", 1,
               "Sum of the judge's scores of the answers over that of the references, both from 1 to 10."),
    MetricInfo("judge_score", "Judge's score", "judge's score", "of 10", "higher", 2,
               "Mean score that the judge gave the answers, from 1 to 10."),
    MetricInfo("judge_reference_score", "Reference's score", "judge's score of the references", "of 10", None, 2,
               "Mean score that the judge gave the references beside the answers, from 1 to 10."),
    MetricInfo("win_rate", "Wins", "share of rows won before the judge", "%", "higher", 1,
               "Share of rows whose answer the judge prefers in both orders.", scale=100, yes=1),
    MetricInfo("tie_rate", "Ties", "share of rows without a winner", "%", None, 1,
               "Share of rows where both orders give a tie, or the two disagree.", scale=100, yes=1),
    MetricInfo("flip_rate", "Flips", "share of rows whose verdict changes with the order", "%", None, 1,
               "Share of rows where the judge's verdict changes when the two answers change places: its position bias.",
               scale=100, yes=1),
    MetricInfo("unparsable_share", "Unreadable verdicts", "share of verdicts that could not be read", "%", None, 1,
               "Share of the judge's verdicts that name no score or winner; their rows count for no other metric.",
               scale=100, yes=1),
)
# By group: name, label, unit, meaning; in the order in which the page plots them.
_LOGGED = {
    "Losses": (
        ("loss", "Training loss", "nats/token", "The loss that the student's optimizer minimizes."),
        ("student_kl", "Student KL", "nats/token",
         "KL between student and (prompted) teacher on the training responses, in the method's direction."),
        ("student_loss", "Student loss", "nats/token", "The method's loss of the student, per token."),
        ("sampled_kl", "Sampled KL", "nats/token",
         "Reverse KL of student and teacher, estimated by the sampled tokens alone (opd)."),
        ("contrast_beta", "Weight β", "", "Weight of the loss on the student's responses, against 2 - β (distillm2)."),
        ("alpha_teacher", "Skew α, teacher's", "", "Mean α on the teacher's responses (distillm2)."),
        ("alpha_student", "Skew α, student's", "", "Mean α on the student's responses (distillm2)."),
        ("gap_teacher", "Gap, teacher's", "",
         "Mean probability per token of teacher minus student, on the teacher's responses (distillm2)."),
        ("gap_student", "Gap, student's", "",
         "Mean probability per token of student minus teacher, on the student's responses (distillm2)."),
        ("language_loss", "Language modeling", "nats/token", "Cross-entropy on the plain text."),
        ("prompt_kl", "Prompt KL", "nats/token", "KL between the prompted teacher and the student."),
        ("prompt_regularizer", "Prompt regularizer", "nats/token", "KL between the prompted and the plain teacher."),
        ("lambda", "Regularizer weight λ", "", "Weight of the regularizer; it falls to c/K."),
        ("taid_t", "TAID's t", "", "Teacher's share of the target's logits, the student's being 1 - t (taid)."),
        ("veto_beta", "Veto's β", "", "Exponent of the student in the target p q^β (veto)."),
        ("prompt_lag", "Prompt staleness", "steps", "Updates since the prompt that the student learns from."),
    ),
    "Responses": (
        ("entropy", "Entropy", "nats/token", "Entropy of the student's next-token distribution."),
        ("top_overlap", "Top-token overlap", "%",
         "Response tokens at which student and (prompted) teacher have the same most probable token."),
        ("repetition", "Repetition", "%", "Share of a response's 4-grams that it has more than once."),
        ("response_length", "Response length", "tokens", "Mean length of the sampled responses."),
        ("student_share", "Student's share", "", "Share of the responses that the student writes (distillm)."),
        ("replaced_share", "Replaced tokens", "%",
         "Tokens that the teacher has put in the place of the student's, of the responses that it corrects (skd)."),
        ("replay_size", "Replay buffer", "responses", "Responses in the replay buffer (distillm)."),
        ("replayed_share", "Replayed rows", "%", "Rows of the step that came from the replay buffer (distillm)."),
        ("cut_share", "Cut at the limit", "%", "Responses that reach the length limit without an end."),
    ),
    "Norms and rates": (
        ("prompt_norm", "Prompt norm", "", "Norm of the soft prompt."),
        ("prompt_distance", "Prompt distance", "", "Distance of the soft prompt from its start."),
        ("adapter_distance", "Adapter distance", "", "Distance of the teacher's trained weights from their start."),
        ("grad_norm", "Gradient norm", "", "Of the student, before clipping."),
        ("prompt_grad_norm", "Prompt gradient norm", "", "Of the soft prompt, before clipping."),
        ("learning_rate", "Learning rate", "", "Of the student."),
        ("prompt_learning_rate", "Prompt learning rate", "", "Of the soft prompt."),
        ("skipped_steps", "Skipped steps", "steps", "Steps skipped because a loss or gradient was NaN or infinite."),
        ("epoch", "Epoch", "", "Passes over the training rows."),
    ),
    "Time": (
        ("tokens_per_second", "Throughput", "tokens/s", "Prompt and response tokens trained on per second."),
        ("seconds_rollout", "Rollout", "s", "Seconds of a step spent on sampling responses."),
        ("seconds_prompt", "Prompt step", "s", "Seconds of a step spent on the soft prompt."),
        ("seconds_student", "Student step", "s", "Seconds of a step spent on the student."),
    ),
}
# fmt: on
METRICS = {info.name: info for info in _MEASURED}
LOGGED = {
    name: MetricInfo(name, label, label, unit, meaning=meaning, scale=100 if unit == "%" else 1)
    for group in _LOGGED.values()
    for name, label, unit, meaning in group
}
_GROUP_OF = {name: title for title, group in _LOGGED.items() for name, *_ in group}
_VALIDATION = "eval_"
_OWN: dict[str, Better] = {"own:": "higher", "own-lower:": "lower"}
_OF_EVALUATE: dict[str, Better] = {  # metrics of Hugging Face's evaluate, whose records name no direction
    **dict.fromkeys(("bertscore", "bleu", "bleurt", "chrf", "exact_match", "google_bleu", "meteor"), "higher"),
    **dict.fromkeys(("nist_mt", "rouge", "sacrebleu"), "higher"),
    **dict.fromkeys(("cer", "character", "ter", "wer"), "lower"),
}
# Of these metrics, the fields with that direction; others are counts and parts.
_FIELDS = {"score", "cer_score", "f1", "precision", "recall", "rouge1", "rouge2", "rougeL", "rougeLsum"}


def metric_info(name: str) -> MetricInfo:
    """The metric of an evaluation; an unknown one is shown by its name.

    The label of a custom function tells its direction; the common metrics of Hugging Face's evaluate have a known one.
    """
    for prefix, better in _OWN.items():
        if name.startswith(prefix):
            label = name.removeprefix(prefix)
            return MetricInfo(name, label, label, "", better, 2, "A function of one's own.")
    source, _, metric = name.partition(":")
    if source == "evaluate":
        short, _, field = metric.partition(":")
        known = _OF_EVALUATE.get(short) if field in ("", short) or field in _FIELDS else None
        return MetricInfo(name, name, name, better=known, meaning="A metric of Hugging Face's evaluate.")
    return METRICS.get(name) or MetricInfo(name, name, name)


def in_order(names: Iterable[str]) -> list[str]:
    """Known metrics in the order of `METRICS`, then the others in the order of their first appearance."""
    given = list(dict.fromkeys(names))
    return [name for name in METRICS if name in given] + [name for name in given if name not in METRICS]


def logged_info(name: str) -> MetricInfo:
    """The metric that training logs as `name`; "eval_" before a metric is that metric on the validation rows.

    "[NAME]" behind one is that metric of a teacher's rows or of its prompt, where there are several teachers.
    """
    metric, teacher = _of_teacher(name)
    if teacher:
        info = logged_info(metric)
        return replace(info, name=name, label=f"{info.label}, {teacher}", phrase=f"{info.phrase}, {teacher}")
    measured = METRICS.get(name.removeprefix(_VALIDATION)) if name.startswith(_VALIDATION) else None
    if name in LOGGED or measured is None:
        return LOGGED.get(name) or MetricInfo(name, name, name)
    label = "Validation loss" if measured.name == "loss" else f"Validation {measured.label}"
    return replace(measured, name=name, label=label, better=None, decimals=3)


def logged_group(name: str) -> str:
    """The group of plots that a logged metric belongs to."""
    metric, _ = _of_teacher(name)
    return _GROUP_OF.get(metric) or ("Validation" if name.startswith(_VALIDATION) else "Other metrics")


def in_log_order(names: Iterable[str]) -> list[str]:
    """Known metrics in the order of `LOGGED`, each with those of single teachers behind it; then the others."""
    places = {name: at for at, name in enumerate(LOGGED)}

    def place(name: str) -> tuple[int, bool]:
        metric, teacher = _of_teacher(name)
        return places.get(metric, len(places)), metric in places and bool(teacher)

    return sorted(dict.fromkeys(names), key=place)


def _of_teacher(name: str) -> tuple[str, str]:
    """ "prompt_kl[math]" -> "prompt_kl", "math"; a name that ends otherwise is whole."""
    metric, found, teacher = name.removesuffix("]").partition("[")
    is_known = metric in LOGGED or metric.removeprefix(_VALIDATION) in METRICS
    return (metric, teacher) if found and name.endswith("]") and is_known else (name, "")
