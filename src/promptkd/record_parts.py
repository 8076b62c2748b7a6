"""What all parts of a record (`results.py`) are; what was seen before training; what explains a trained soft prompt."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Part of a record: validated, and without keys that nobody knows."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", val_json_bytes="utf8")


class Preflight(Record):
    """What a distillation looked like before its first step; of a few rows, where the models were measured."""

    rows: str
    """How many training rows are used and how many were dropped, and why."""
    template: str
    turns: str
    """Which assistant turns train: "last" or "all"."""
    ends: list[str]
    """The tokens that end a response in this run."""
    teacher_ends: list[str]
    """Those that the teacher's own generation configuration names."""
    limit: int
    """Most tokens of a response."""
    vocabulary: int
    measured_rows: int = 0
    seconds: float = 0.0
    reference_length: float | None = None
    """Mean tokens of a reference; None where rows have none."""
    student_loss: float | None = None
    """Nats per token of the references."""
    teacher_loss: float | None = None
    unmeasured: str = ""
    """Why the models were not measured; empty in older records, too."""
    own_teacher: bool = False
    """Whether the teacher is made of the student."""
    kl_to_teacher: float | None = None
    """KL(student || teacher) in nats per token of the student's samples; None where nothing was measured."""
    kl_per_response: float | None = None
    contexts: int = 0  # measured rows whose teacher reads a context that the student does not
    top_overlap: float | None = None
    """Share of these tokens at which both models have the same most probable token."""
    response_length: float | None = None
    """Mean tokens of the student's samples."""
    teacher_answers: int = 0
    """Rows that the teacher answered."""
    teacher_cut: int = 0
    """Those of its answers that had no end within the limit."""
    teacher_length: float | None = None
    teacher_control: str = ""
    """The control token of the template that most of its cut answers hold; empty if there is none."""
    teacher_control_answers: int = 0


class TokenCosine(Record):
    """A token, and the cosine of its embedding with a vector."""

    id: int
    token: str
    cosine: float


class PromptVector(Record):
    """One trained vector of a soft prompt."""

    norm: float
    nearest: list[TokenCosine]
    """The tokens whose embeddings have the largest cosine with it, the nearest first."""
    start: str | None = None
    """The token that it started from; None where it is not known, or where the start was random."""
    distance: float | None = None
    """Norm of its difference from its start; None where the start is not known."""
    cosine_with_start: float | None = None


class PositionMean(Record):
    """A mean over the response tokens at positions `first` to `last`, counted from 1, of all rows that reach them."""

    first: int
    last: int
    value: float
    low: float | None = None
    """Lower end of the 95 % interval, by bootstrap over rows; None of a single row."""
    high: float | None = None
    rows: int
    """Rows that reach `first`."""


class PositionCurve(Record):
    """A KL in nats per token by position in the response."""

    whole: PositionMean
    """Over all positions."""
    positions: list[PositionMean]


class PromptAnswer(Record):
    """One request, with the answers of the teacher without and with the prompt, and of the student."""

    row: int
    prompt: str
    """What the models read, in the template's words."""
    request: list[tuple[str, str]] = []
    """The same without the template: roles and texts; empty where the row's prompt is a text."""
    plain: str
    prompted: str
    student: str


class PromptExplanation(Record):
    """What a trained soft prompt is made of, and what it changes in its teacher."""

    folder: str
    """Of the prompt, in its run: "prompt", or of one of several teachers "prompt/NAME"."""
    vectors: list[PromptVector]
    norm: float
    """Frobenius norm of all vectors."""
    distance: float | None = None
    """The same of their difference from the start; None where that is not known."""
    tokens: int
    """How many tokens were looked through for the nearest ones."""
    random_cosine: float
    """The cosine with their nearest token that 95 % of random directions stay below: a vector below is near none."""
    kl: dict[str, PositionCurve] = {}
    """By "prompted_to_plain", "prompted_to_student" and "plain_to_student", teacher first: on the student's samples."""
    answers: list[PromptAnswer] = []
