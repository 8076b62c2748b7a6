"""What all parts of a record (`results.py`) are, and the part that explains a trained soft prompt."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Part of a record: validated, and without keys that nobody knows."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", val_json_bytes="utf8")


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
