"""Records as the commands write them, with made-up figures: five models on one data set."""

import math
import random
from collections.abc import Callable
from typing import Any

from promptkd.results import (
    Curve,
    CurvePoint,
    DataRecord,
    Difference,
    Evaluation,
    Metric,
    ModelRecord,
    Results,
    RowResult,
    Series,
    Training,
)

STUDENTS = ("sft", "kd", "gkd", "promptkd")
QUALITY = {"gpt2-xl": 27.0, "sft": 19.5, "kd": 21.8, "gkd": 23.9, "promptkd": 25.1}
SEEDS = (10, 20)
WORDS = tuple(
    word
    for line in (
        "the of and to in is that it for as with on are by an be this from or which one water energy people city light",
        "country language because usually different important between plants animals history music system number",
        "large world first used many also can made most when they their two more after where",
    )
    for word in line.split()
)
Rows = list[tuple[str, list[str]]]
"""Prompt and references by row."""


def made_up_rows(count: int, seed: int = 0) -> Rows:
    """Requests in the Alpaca form whose references have the lengths that Dolly's have."""
    draw = random.Random(seed)
    frame = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    return [
        (f"{frame}\n\n### Instruction:\nQuestion {row}: {text(draw, 14)}?\n\n### Response:\n", [text(draw, 55)])
        for row in range(count)
    ]


def text(draw: random.Random, mean: int) -> str:
    return " ".join(draw.choices(WORDS, k=max(1, round(draw.lognormvariate(math.log(mean), 0.6)))))


def answered_by(draw: random.Random, reference: str, share: float) -> str:
    """The reference with about `share` of its words kept."""
    words = [word if draw.random() < share else draw.choice(WORDS) for word in reference.split()]
    return " ".join(words[: max(1, round(len(words) * draw.uniform(0.6, 1.3)))])


def study(rows: Rows, answer: Callable[[random.Random, str, float], str] = answered_by) -> list[Results]:
    """Of each student its run, evaluation and exposure bias; the teacher's evaluation; a comparison."""
    records = [evaluated("gpt2-xl", rows, answer)]
    for student in STUDENTS:
        records += [distilled(student), evaluated(student, rows, answer), biased(student, min(200, len(rows)))]
    return [*records, compared(len(rows))]


def model(label: str) -> ModelRecord:
    size = 1_557_611_200 if label == "gpt2-xl" else 124_439_808
    return ModelRecord(path=f"runs/{label}", parameters=size, sha256=f"{sum(map(ord, label)):064x}")


def stamped(kind: Any, **fields: Any) -> Results:
    """A record without anything of this machine."""
    return Results(
        kind=kind,
        created="2026-03-01T09:30:00+00:00",
        command=["promptkd", kind],
        code={"promptkd": "0.1.0", "torch": "2.9.0", "git_commit": None},
        machine={"system": "Linux", "cores": 2, "memory_bytes": 16 * 2**30},
        **fields,
    )


def distilled(student: str) -> Results:
    draw = random.Random(student)
    points = [
        {
            "step": step,
            "loss": 0.4 + 1.6 * math.exp(-step / 60) + draw.gauss(0, 0.05),
            "student_kl": 0.3 + math.exp(-step / 60) + draw.gauss(0, 0.05),
            "response_length": 60 - 20 * math.exp(-step / 40) + draw.gauss(0, 3),
            "tokens_per_second": 2100 + draw.gauss(0, 60),
            "learning_rate": 5e-5 * (1 - step / 300),
        }
        for step in range(1, 301, 3)
    ]
    own = model(student).model_copy(update={"path": f"runs/{student}/student"})
    return stamped(
        "distill",
        config={"method": student, "learning_rate": 5e-5, "max_steps": 300},
        models={"student": own, "teacher": model("gpt2-xl")},
        data={"train": DataRecord(path="dolly_train.jsonl", rows=11435, sha256="c" * 64, dropped=52)},
        history=[Series(name="distill", points=points)],
        timings={"train": 3725.0},
        notes=["Peak memory 11.2 GiB."],
    )


def evaluated(label: str, rows: Rows, answer: Callable[[random.Random, str, float], str] = answered_by) -> Results:
    models = {label: model(label)}
    if label != "gpt2-xl":
        models["teacher gpt2-xl"] = model("gpt2-xl")
    sampled = evaluation(label, rows, SEEDS, answer)
    greedy = evaluation(label, rows, (None,), answer)
    return stamped(
        "evaluate",
        config={"model": f"runs/{label}", "seeds": list(SEEDS)},
        models=models,
        data={"dolly_test": DataRecord(path="dolly_test.jsonl", rows=len(rows), sha256="d" * 64)},
        evaluations=[sampled, greedy],
        notes=["Peak memory 3.1 GiB."],
    )


def evaluation(
    label: str, rows: Rows, seeds: tuple[int | None, ...], answer: Callable[[random.Random, str, float], str]
) -> Evaluation:
    quality = QUALITY[label]
    samples = []
    for seed in seeds:
        draw = random.Random(f"{label} {seed}")
        for row, (prompt, references) in enumerate(rows):
            response = answer(draw, references[0], quality / 40)
            samples.append(
                RowResult(
                    row=row,
                    seed=seed,
                    prompt=prompt,
                    references=references,
                    response=response,
                    scores=scores(draw, label, response, references[0]),
                )
            )
    names = samples[0].scores
    decoding: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 256}
    if seeds[0] is not None:
        decoding = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 256, "seeds": list(seeds)}
    metrics = {name: averaged([sample.scores[name] for sample in samples], len(seeds) > 1) for name in names}
    return Evaluation(model=label, data="dolly_test", decoding=decoding, metrics=metrics, samples=samples)


def scores(draw: random.Random, label: str, response: str, reference: str) -> dict[str, float]:
    quality, length = QUALITY[label], len(response.split())
    rouge = min(100.0, max(0.0, draw.gauss(quality, 14)))
    found = {"loss": draw.lognormvariate(1.3 - quality / 60, 0.35)}
    if label != "gpt2-xl":
        found["kl_to_teacher"] = draw.lognormvariate(0.8 - quality / 20, 0.4)
    ended = float(draw.random() < 0.85 + quality / 300)
    return found | {
        "rouge_l": rouge,
        "rouge_1": min(100.0, rouge * 1.2),
        "exact_match": 100.0 * (draw.random() < quality / 900),
        "eos_share": ended,
        "cut_share": 1 - ended,
        "length_ratio": length / len(reference.split()),
        "distinct_1": len(set(response.split())) / length,
        "distinct_2": min(1.0, draw.gauss(0.93, 0.05)),
        "response_length": float(round(length * 1.3)),
    }


def averaged(values: list[float], seeded: bool) -> Metric:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) ** 2)
    deviation = spread / 2 if seeded else None
    return Metric(
        value=mean,
        low=mean - 2 * spread,
        high=mean + 2 * spread,
        rows=len(values) // (2 if seeded else 1),
        deviation=deviation,
    )


def biased(student: str, rows: int = 12) -> Results:
    level = (27 - QUALITY[student]) / 4
    points = []
    for length in range(1, 101):
        value, half = level * 6 * math.log1p(length / 6), 1.5 + length / 15
        defined = length <= 95 and length != 40
        points.append(
            CurvePoint(
                x=length,
                value=value if defined else None,
                low=value - half if defined else None,
                high=value + half if defined else None,
                rows=rows if defined else 0,
            )
        )
    return stamped(
        "exposure-bias",
        models={student: model(student), "teacher gpt2-xl": model("gpt2-xl")},
        data={"dolly_test": DataRecord(path="dolly_test.jsonl", rows=rows, sha256="d" * 64)},
        curves=[
            Curve(
                name="exposure_bias",
                model=student,
                data="dolly_test",
                settings={"samples": 4, "prompted_teacher": False},
                points=points,
            )
        ],
    )


def compared(rows: int) -> Results:
    names = {
        "rouge_l": ("higher", 1.0),
        "loss": ("lower", 0.05),
        "kl_to_teacher": ("lower", 0.08),
        "exact_match": ("higher", 0.2),
    }
    differences = []
    for baseline in ("gkd", "kd", "sft"):
        ahead = QUALITY["promptkd"] - QUALITY[baseline]
        for name, (better, scale) in names.items():
            value = ahead * scale * (1 if better == "higher" else -1)
            half = 1.4 * scale
            differences.append(
                Difference.model_validate(
                    {
                        "model": "promptkd",
                        "baseline": baseline,
                        "metric": name,
                        "data": "dolly_test",
                        "difference": {"value": value, "low": value - half, "high": value + half, "rows": rows},
                        "better": better,
                        "p_value": 0.0004 if ahead > 2 else 0.09,
                        "p_adjusted": 0.0048 if ahead > 2 else 0.27,
                        "effect_size": value / scale / 14,
                    }
                )
            )
    return stamped(
        "compare",
        models={label: model(label) for label in STUDENTS},
        data={"dolly_test": DataRecord(path="dolly_test.jsonl", rows=rows, sha256="d" * 64)},
        differences=differences,
        training={
            label: Training(
                method=label,
                steps=300,
                seconds=3600 + at * 400,
                peak_memory_bytes=(9 + at) * 2**30,
                tokens_per_second=2100,
            )
            for at, label in enumerate(STUDENTS)
        },
    )


def explained(*, token: str = " the", answer: str = "An answer.", kl: bool = True) -> Results:
    """A record of `explain-prompt`: two vectors, curves to the 40th token, and one request."""
    nearest = [{"id": at, "token": token, "cosine": 0.9 - at / 5} for at in range(5)]
    vector = {"norm": 1.5, "nearest": nearest, "start": token, "distance": 0.25, "cosine_with_start": 0.97}

    def curve(level: float) -> dict[str, Any]:
        spans = [(at, at) for at in range(1, 33)] + [(33, 40)]
        means = [
            {"first": first, "last": last, "value": level + first / 50, "low": level, "high": level + 1, "rows": 8}
            for first, last in spans
        ]
        return {"whole": {"first": 1, "last": 40, "value": level, "rows": 8}, "positions": means}

    names = ("prompted_to_plain", "prompted_to_student", "plain_to_student")
    return Results.model_validate(
        {
            "kind": "explain-prompt",
            "prompts": [
                {
                    "folder": "prompt",
                    "vectors": [vector, vector | {"start": None, "distance": None, "cosine_with_start": None}],
                    "norm": 2.1,
                    "distance": 0.3,
                    "tokens": 50_000,
                    "random_cosine": 0.4,
                    "kl": {name: curve(0.5 + at) for at, name in enumerate(names)} if kl else {},
                    "answers": [
                        {"row": 3, "prompt": answer, "plain": answer, "prompted": "Another.", "student": ""},
                    ],
                }
            ],
        }
    )


def run_cost(method: str) -> Training:
    return Training(method=method, steps=2, seconds=60, peak_memory_bytes=2**30)


def trained_under(method: str, seed: int, losses: list[object]) -> Results:
    run = f"{method}-seed-{seed}"
    points = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    models = {"student": ModelRecord(path=f"out/{run}/student", parameters=9, sha256=run)}
    return Results(
        kind="distill",
        models=models,
        training={run: run_cost(method)},
        history=[Series(name="distill", points=points)],
    )


def runs_of_two_methods() -> list[Results]:
    """A study of kd and gkd under two seeds; a loss of kd's second is not finite."""
    study = Results(kind="study", training={"kd": run_cost("kd"), "gkd": run_cost("gkd")})
    kd = [trained_under("kd", 1, [4.0, 1.0]), trained_under("kd", 2, [2.0, "NaN"])]
    return [study, *kd, trained_under("gkd", 1, [5.0, 3.0]), trained_under("gkd", 2, [7.0, 3.0])]
