"""The record of a demo run: four models, two stages of training, twelve rows of answers, hostile strings among them."""

import math
from typing import Any

from promptkd.results import DataRecord, Difference, Evaluation, Metric, ModelRecord, Results, RowResult, Series

HOSTILE = (
    "</script><script>window.owned = 1</script>",
    "<img src=x onerror='window.owned = 2'>",
    '<a href="javascript:window.owned = 3">click</a> {{ 7 * 7 }} ${7 * 7} <!-- --> & &lt;',
    "line\u2028separator\u2029paragraph \x1b[31mred\x1b[0m \x00 nul \u202edrawkcab",
    "<style>body { display: none }</style><iframe src='https://example.com'></iframe>",
)
MODELS = ("teacher", "pruned", "recovered", "promptkd")
LOGGED = (
    "loss",
    "prompt_kl",
    "prompt_regularizer",
    "lambda",
    "student_kl",
    "entropy",
    "response_length",
    "cut_share",
    "prompt_norm",
    "prompt_distance",
    "grad_norm",
    "prompt_grad_norm",
    "learning_rate",
    "prompt_learning_rate",
    "tokens_per_second",
    "seconds_rollout",
    "seconds_prompt",
    "seconds_student",
)
EVALUATED = ("eval_loss", "eval_rouge_l", "eval_kl_to_teacher")
FIGURES = {  # by model, in the order of MODELS: value, low, high
    "loss": ((2.412, 2.31, 2.52), (3.36, 3.2, 3.51), (2.683, 2.57, 2.80), (2.661, 2.55, 2.78)),
    "kl_to_teacher": (None, (1.92, 1.7, 2.2), (0.91, 0.84, 0.99), (0.61, 0.55, 0.68)),
    "rouge_l": ((22.4, 19, 26), (10.9, 8, 14), (26.1, 22.8, 29.9), (26.7, 23.1, 30.4)),
    "exact_match": ((4, 0, 10), (0, 0, 0), (6, 0, 14), (6, 0, 14)),
    "eos_share": ((0.96, 0.9, 1), (0.12, 0.04, 0.22), (0.9, 0.8, 0.98), (0.94, 0.86, 1)),
    "cut_share": ((0.04, 0, 0.1), (0.88, 0.78, 0.96), (0.1, 0.02, 0.2), (0.06, 0, 0.14)),
    "response_length": ((31.2, 28, 34), (47.1, 45, 48), (22.9, 20, 26), (24.0, 21, 27)),
}
ANSWER = "Plants take in carbon dioxide and water, and with the light of the sun they make sugar and oxygen."


def record() -> Results:
    """Four models, two stages of history, twelve rows of answers, hostile strings among them."""
    return Results(
        kind="demo",
        created="2026-03-01T09:30:00+00:00",
        command=["promptkd", "demo", "--out", "runs/demo run"],
        config={"method": "promptkd", "steps": 30, "prompt": {"length": 7, "text": "Suppose you are a student."}},
        code={"git_commit": None, "promptkd": "0.1.0", "torch": "2.9.0", "peft": None},
        machine={
            "system": "Linux",
            "architecture": "x86_64",
            "cores": 2,
            "memory_bytes": 16 * 2**30,
            "python": "3.11.2",
        },
        models={
            name: ModelRecord(path=f"runs/demo run/{name}", parameters=size, sha256=f"{size:064x}")
            for name, size in zip(MODELS, (134_515_008, 110_800_000, 110_800_000, 110_800_000), strict=True)
        },
        data={
            "train": DataRecord(path="demo/data/train.jsonl", rows=300, sha256="a" * 64, dropped=4),
            "test": DataRecord(path="demo/data/test.jsonl", rows=50, sha256="b" * 64),
        },
        metrics={"exact_match": Metric(value=6, low=0, high=14, rows=50)},
        evaluations=[evaluation(index) for index in range(len(MODELS))],
        differences=differences(),
        history=history(),
        timings={"convert": 17.4, "recover": 95.31, "distil": 3725.0},
        notes=["The teacher was tuned on the training rows first; all figures are of one seed."],
    )


def evaluation(index: int) -> Evaluation:
    metrics = {"novelty": Metric(value=0.123 + index - 3)}
    for name, by_model in FIGURES.items():
        measured = by_model[index]
        if measured is not None:
            value, low, high = measured
            metrics[name] = Metric(value=value, low=low, high=high, rows=50)
    return Evaluation(
        model=MODELS[index],
        data="test",
        decoding={"max_new_tokens": 48, "strategy": "greedy"},
        metrics=metrics,
        samples=[sample(index, row) for row in range(12)],
    )


def sample(index: int, row: int) -> RowResult:
    prompts = ["How does photosynthesis work? Answer in one sentence.", "Name three\nprimary colors.", *HOSTILE]
    response = HOSTILE[row - 2] if 2 <= row < 7 and index == 3 else "" if (index, row) == (1, 1) else ANSWER[row * 2 :]
    return RowResult(
        row=row,
        prompt=f"<|im_start|>user\n{prompts[row % len(prompts)]}<|im_end|>\n<|im_start|>assistant\n",
        references=["Red, yellow and blue.", "Blue, red, yellow."] if row == 1 else [ANSWER],
        response=response * (30 if (index, row) == (1, 0) else 1),
        scores={"rouge_l": 31.2 + row, "eos_share": float(index != 1), "response_length": 20.0 + index},
    )


def differences() -> list[Difference]:
    rows = [
        ("recovered", "pruned", "loss", -0.68, -0.77, -0.58, "lower"),
        ("recovered", "pruned", "rouge_l", 15.2, 12.0, 18.8, "higher"),
        ("recovered", "pruned", "eos_share", 0.78, 0.66, 0.9, "higher"),
        ("promptkd", "teacher", "loss", 0.249, 0.19, 0.31, "lower"),
        ("promptkd", "recovered", "kl_to_teacher", -0.3, -0.36, -0.25, "lower"),
        ("promptkd", "recovered", "loss", -0.022, -0.06, 0.02, "lower"),
        ("promptkd", "recovered", "rouge_l", 0.6, -1.9, 3.0, "higher"),
        ("promptkd", "recovered", "exact_match", 0.0, None, None, "higher"),
    ]
    return [
        Difference.model_validate(
            {
                "model": model,
                "baseline": baseline,
                "metric": name,
                "difference": {"value": value, "low": low, "high": high, "rows": 50},
                "better": better,
            }
        )
        for model, baseline, name, value, low, high, better in rows
    ]


def history() -> list[Series]:
    recovery: list[dict[str, Any]] = []
    distillation: list[dict[str, Any]] = []
    for step in range(1, 61):
        wave = math.sin(step * 1.7) * 0.1
        point = {name: 2 * math.exp(-step / 15) + 0.5 + wave + at for at, name in enumerate(LOGGED)}
        point |= {"cut_share": 0.5 if step == 1 else 0.2 + wave, "learning_rate": 2e-5 * (1 - step / 61), "step": step}
        recovery.append({name: point[name] for name in LOGGED if "prompt" not in name} | {"step": step})
        if step <= 30:
            distillation.append(point | {"lambda": 1 - (step - 1) / 30, "made_up": step**0.5})
            distillation[-1]["grad_norm"] = "NaN" if step == 4 else point["grad_norm"]
        if step % 10 == 0 and step <= 30:
            distillation[-1] |= {name: 3 - step / 20 + at for at, name in enumerate(EVALUATED)}
            recovery[-1] |= {name: 4 - step / 20 + at for at, name in enumerate(EVALUATED)}
    recovery[-1] |= {"train_runtime": 95.2, "phase": "end"}
    return [Series(name="recovery", points=recovery), Series(name="promptkd", points=distillation)]
