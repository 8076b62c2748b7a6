"""Records of exposure bias with made-up errors, of the runs of a study."""

import numpy as np

from promptkd.evaluation import Bootstrap
from promptkd.evaluation.accumulated_error import excess_accumulated_error
from promptkd.results import Curve, DataRecord, Results

ROWS = 12


def errors(draw: np.random.Generator, level: float, longest: int = 6) -> list[list[np.ndarray]]:
    """Two continuations per row, of 3 tokens or more, whose errors grow by `level` per token."""
    lengths = draw.integers(3, longest + 1, size=(ROWS, 2))
    return [[(1 + level * np.arange(n)) * draw.uniform(0.5, 1.5, n) for n in row] for row in lengths]


def curve_of(model: str, seed: int, level: float, **settings) -> Curve:
    draw = np.random.default_rng(seed)
    teacher = errors(draw, 0)
    points = excess_accumulated_error(errors(draw, level), teacher, bootstrap=Bootstrap(50))
    return Curve(name="exposure_bias", model=model, data="t", settings={"seeds": [10, 11], **settings}, points=points)


def record(*curves: Curve) -> Results:
    return Results(kind="exposure-bias", curves=list(curves), data={"t": DataRecord(path="t", rows=ROWS, sha256="ab")})


def biased_runs(levels: dict[str, float], seeds=(1, 2, 3)) -> dict[str, dict[int, Results]]:
    return {
        group: {seed: record(curve_of(f"{group}-seed-{seed}", seed, level)) for seed in seeds}
        for group, level in levels.items()
    }
