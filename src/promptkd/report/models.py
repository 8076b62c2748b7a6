"""What the models of a page are, and what PromptKD is, for a reader who knows neither."""

from collections.abc import Sequence

from promptkd.report.formatting import millions
from promptkd.report.labels import is_teacher
from promptkd.report.tables import model_order
from promptkd.results import BEFORE, Results

PROMPTKD = (
    "PromptKD makes a small language model, the student, out of a large one, the teacher.",
    "The student answers requests in its own words, and learns from what the teacher would have said at each word.",
    "A few trained vectors before the teacher's input, the soft prompt, bring the teacher to answer in a way that the "
    "student can follow, while a second term keeps it close to its own answers.",
    "When training is done, only the student is needed.",
)
_OF_DEMO = {  # of demos from before a record said so of each model
    "teacher": "the large model, tuned on the demo's training rows",
    "pruned": "the teacher without some of its layers; nothing is trained yet",
    "recovered": "the pruned student after distillation on the responses of the data",
    "promptkd": "the recovered student after PromptKD",
}


def is_about_promptkd(records: Sequence[Results]) -> bool:
    """Whether a model of these records was trained by PromptKD or one of its forms."""
    methods = [str(record.config.get("method", "promptkd")) for record in records if record.kind == "distill"]
    methods += [each.method for record in records for each in record.training.values()]
    return any(method.startswith("promptkd") for method in methods) or any(each.kind == "demo" for each in records)


def shown_models(records: Sequence[Results]) -> list[tuple[str, str]]:
    """Label and description of each model that the `unified` records measured, of those that have a description."""
    told: dict[str, str] = {}
    for record in records:
        for label, model in record.models.items():
            words = model.about or (_OF_DEMO.get(label, "") if record.kind == "demo" else "")
            if words or record.kind in ("distill", "evaluate"):
                size = f"{millions(model.parameters)} parameters"
                context = ", which reads a context that the student does not see" if model.context else ""
                told.setdefault(label, f"{words or _role(label, model.path)}{context}; {size}")
        if record.kind == "demo":
            told |= {label: _OF_DEMO[label] for label in _OF_DEMO if label not in record.models and label not in told}
    return [(label, told[label]) for label in model_order(records) if label in told]


def context_sentence(records: Sequence[Results]) -> str:
    """That a teacher was measured with a context of its own; "" if none was."""
    if not any(model.context for record in records for model in record.models.values()):
        return ""
    what = "its own answers and the KL to it are those with that context"
    return f"The teacher reads a context that the student does not see: {what}."


def _role(label: str, path: str) -> str:
    role = "the teacher" if is_teacher(label) else "the student" if label == BEFORE else "the distilled student"
    return f"{role}, {path}"
