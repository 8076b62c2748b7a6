"""The evidence's records and page: a study is kept without texts, pools as before, and the page is made of it."""

import gzip
import importlib
import itertools
import json
import re
import shutil
import xml.etree.ElementTree
import zlib
from pathlib import Path, PurePath
from typing import get_args

import numpy as np
import pytest
import yaml
from benchmarks.evidence.__main__ import DOCS, README, RECORDS, outdated
from benchmarks.evidence.leaks import counted
from benchmarks.evidence.page import BEGIN, END, HERE, ROOT, build, build_readme
from benchmarks.evidence.records import collect
from benchmarks.evidence.studies import Committed, Point, committed
from benchmarks.evidence.svg import Axis, Interval, Mark, forest, scatter
from benchmarks.evidence.tables import choices_table, chosen, leaders, log_table, metrics_table

from helpers.bias_records import curve_of
from helpers.commands import done
from helpers.records import stamped
from promptkd.cli.commands.distill import checked
from promptkd.cli.parsing.config_file import read_config
from promptkd.cli.parsing.parser import parse_options
from promptkd.cli.study_comparison import read_study
from promptkd.cli.training_run import TrainingRun
from promptkd.data import examples_from_rows, read_examples
from promptkd.errors import RequestError
from promptkd.report.formatting import duration
from promptkd.results import Curve, DataRecord, Evaluation, Metric, ModelRecord, Results, RowResult, Series, Training
from promptkd.study.plan import plan_runs
from promptkd.training import FinetuneConfig
from promptkd.training.collapse import findings

pytestmark = pytest.mark.slow

SECRET = "a text of the data"
PLANNED = ("base", "methods", "seeds", "grid")
COMMITTED = sorted(each.parent for each in RECORDS.glob("*/config.yaml"))
ROWS, SEEDS = 12, (10, 20, 30)
QUALITY = {"gkd": 20.0, "promptkd-prompt_learning_rate-0.001": 30.0, "promptkd-prompt_learning_rate-0.005": 21.0}


def evaluation(quality: float, draw: np.random.Generator, data: str = "test", *, greedy: bool) -> Evaluation:
    samples = []
    for row, seed in itertools.product(range(ROWS), [None] if greedy else SEEDS):
        scores, tokens = (
            {"loss": 2 + row / 7 + draw.normal() / 9, "rouge_l": quality + draw.normal(), "eos_share": 1.0},
            {"loss": row + 1},
        )
        if seed != SEEDS[-1]:  # as with `evaluate --kl-seeds 2`
            scores["kl_to_teacher"], tokens["kl_to_teacher"] = abs(draw.normal()), int(draw.integers(1, 9))
        texts = {"prompt": SECRET, "references": [SECRET], "response": SECRET, "request": [("user", SECRET)]}
        samples.append(RowResult(row=row, seed=seed, **texts, scores=scores, tokens=tokens))
    decoding = {"temperature": 0.0 if greedy else 1.0, "max_new_tokens": 8, "seeds": [] if greedy else list(SEEDS)}
    means = {name: np.mean([each.scores[name] for each in samples]) for name in ("rouge_l", "eos_share", "loss")}
    metrics = {name: Metric(value=value) for name, value in means.items()}
    return Evaluation(model="m", data=data, decoding=decoding, metrics=metrics, samples=samples)


def made_study(folder: Path, seeds: list[int], **given) -> Path:
    """A study's folder as `promptkd study` leaves it, of made-up runs."""
    methods = ["gkd", {"name": "promptkd", "grid": {"prompt_learning_rate": [0.001, 0.005]}}]
    base = {"student": "s", "teacher": "t", "data": "d"}
    settings = {"out": "runs/s", "base": base, "methods": methods, "seeds": seeds, "evaluate": {"data": ["test"]}}
    settings |= {"metrics": ["rouge_l", "kl_to_teacher"], "exposure_bias": {"data": ["t"]}}
    names = {f"{group}-seed-{seed}": QUALITY[group] for group in QUALITY for seed in seeds}
    return made_runs(folder, settings, names, **given)


def made_runs(folder: Path, settings: dict, names: dict[str, float], references=("teacher",), steps=200) -> Path:
    """Of each name its records by the study's settings, with numbers about its quality; `references` beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    models = {"teacher": ModelRecord(path="/home/someone/teacher", parameters=9, sha256="cd")}
    sets = [Path(file).stem for file in settings.get("evaluate", {}).get("data", [])]
    beside = dict.fromkeys(references, 40.0) if sets else {}
    for name, quality in [*names.items(), *beside.items()]:
        draw = np.random.default_rng(zlib.crc32(name.encode()))
        asked = [(each, greedy) for each in sets for greedy in (False, True)] or [("validation", False)]
        found = [evaluation(quality + draw.normal() / 4, draw, each, greedy=greedy) for each, greedy in asked]
        data = {each: DataRecord(path=f"{folder.absolute()}/test.jsonl", rows=ROWS, sha256="ab") for each, _ in asked}
        measured = {"evaluations": found, "data": data, "models": models}
        if sets:
            record = stamped("evaluate", **measured, timings={"measuring": 2.0})
            record.write(folder / "evaluations" / name / "results.json")
        if name in references:
            continue
        if biased := [Path(file).stem for file in settings.get("exposure_bias", {}).get("data", [])]:
            curves = [curve_of(model, draw, quality / 40) for model in (name, f"{name} step 20")]
            curves = [curve.model_copy(update={"data": biased[0]}) for curve in curves]
            of_bias = {biased[0]: DataRecord(path=f"{folder.absolute()}/{biased[0]}.jsonl", rows=ROWS, sha256="cd")}
            record = stamped("exposure-bias", data=of_bias, curves=curves, timings={"measuring": 1.0})
            record.write(folder / "exposure-bias" / name / "results.json")
        lines = [{"step": step, "loss": 3 - step / 100 + draw.normal() / 9} for step in range(1, steps + 1)]
        if name.startswith("promptkd"):
            lines = [line | {"prompt_regularizer": line["step"] / 10 if quality < 25 else 0.1} for line in lines]
        validated = (steps // 4, steps // 2, steps)
        lines += [{"step": step, "eval_kl_to_teacher": 1 - step / 400, "eval_loss": 2.5} for step in validated]
        cost = Training(method="m", steps=steps, seconds=80.0, peak_memory_bytes=2**30, tokens_per_second=50.0)
        trained = stamped("distill", **measured, training={name: cost}, timings={"train": 99.0, "evaluate": 2.0})
        trained.history = [Series(name=name, points=lines)]
        trained.write(folder / name / "results.json")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study in runs/prompt and its records in records/prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("world"))
        collect(made_study(Path("runs", "prompt"), [1, 2, 3]), Path("records", "prompt"))
        return Path.cwd()


@pytest.fixture
def study(world, monkeypatch) -> Path:
    monkeypatch.chdir(world)
    return Path("runs", "prompt")


@pytest.fixture(scope="module")
def made(world) -> Committed:
    return committed(world / "records" / "prompt")


def test_records_hold_no_text_and_no_path_and_are_written_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = Path("records", "prompt")
    written = {file.name for file in collect(made_study(Path("runs", "prompt"), [1, 2]), records)}
    runs = {f"{group}-seed-{seed}.json.gz" for group in QUALITY for seed in (1, 2)}
    assert written == runs | {"teacher.json.gz", "config.yaml"}
    text = gzip.decompress((records / "gkd-seed-1.json.gz").read_bytes()).decode()
    assert not any(part in text for part in (SECRET, str(tmp_path), "/home"))
    held = json.loads(text)
    places = ("", "evaluations/", "exposure-bias/")
    assert held.keys() == {f"{place}gkd-seed-1/results.json" for place in places}
    trained = held["gkd-seed-1/results.json"]
    assert "columns" not in trained["evaluations"][0]  # its test rows are those of the evaluation
    points = trained["history"][0]["points"]
    assert [point["step"] for point in points if "eval_loss" in point] == [50, 100, 200]
    assert 40 <= len(points) <= 63
    new = {file.name for file in collect(made_study(Path("runs", "prompt"), [1, 2, 3]), records)}
    assert new == {*(f"{group}-seed-3.json.gz" for group in QUALITY), "config.yaml"}


def test_records_of_runs_that_a_study_no_longer_has_go_and_those_of_another_teacher_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = Path("records", "prompt")
    collect(made_study(Path("runs", "prompt"), [1, 2, 3]), records)
    changed = {file.name for file in collect(made_study(Path("runs", "fewer"), [1, 2]), records)}
    assert {*(f"{group}-seed-3.json.gz" for group in QUALITY), "config.yaml"} <= changed
    assert not any("seed-3" in file.name for file in records.iterdir())

    folder = made_study(Path("runs", "again"), [1, 2])
    for name in (f"{group}-seed-1" for group in QUALITY):
        shutil.rmtree(folder / name)
    for file in folder.rglob("results.json"):
        record = Results.read(file)
        if "teacher" in record.models:
            record.models["teacher"].sha256 = "another"
        record.write(file)
    before = {file: file.read_bytes() for file in records.iterdir()}
    with pytest.raises(RequestError, match=r"seed-1\.json\.gz is of another teacher than the runs in runs/again"):
        collect(folder, records)
    assert {file: file.read_bytes() for file in records.iterdir()} == before


def test_a_rate_is_chosen_by_the_kl_and_among_near_ones_by_the_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"base": {"student": "s", "teacher": "t", "data": "d"}, "methods": ["gkd", "kd"], "seeds": [1]}
    settings |= {"grid": {"learning_rate": [1e-5, 1e-4]}, "metrics": ["kl_to_teacher", "loss"], "out": "runs/rates"}
    names = [f"{method}-learning_rate-{rate}-seed-1" for method in ("gkd", "kd") for rate in ("1e-05", "0.0001")]
    values = {"kl_to_teacher": [0.504, 0.5, 0.6, 0.5], "loss": [2.0, 2.1, 2.0, 2.1]}

    def made(count):
        folder = made_runs(Path("runs", f"rates-{count}"), settings, dict.fromkeys(names[:count], 20.0))
        for at, name in enumerate(names[:count]):
            record = Results.read(folder / name / "results.json")
            for row in record.evaluations[0].samples:
                row.scores |= {metric: given[at] for metric, given in values.items()}
            record.write(folder / name / "results.json")
        collect(folder, Path("records", f"rates-{count}"))
        return committed(Path("records", f"rates-{count}"))

    assert chosen(made(4), "learning_rate", "validation") == {"gkd": 1e-5, "kd": 1e-4}
    assert chosen(made(3), "learning_rate", "validation") == {"gkd": 1e-5}  # of kd a rate is missing
    table = choices_table(made(4), "learning_rate", "validation").splitlines()
    assert table[2:] == ["| gkd | **0.504 / 2.000** | 0.500 / 2.100 |", "| kd | 0.600 / 2.000 | **0.500 / 2.100** |"]


def test_the_studies_take_the_rates_that_were_chosen():
    best = chosen(committed(RECORDS / "rates"), "learning_rate", "validation")
    assert {"gkd", "promptkd", "kd"} <= best.keys()
    for file in sorted((HERE / "studies").glob("*.yaml")):
        study = yaml.safe_load(file.read_text())
        for method in study["methods"] if file.stem != "rates" else []:
            given = {"method": method} if isinstance(method, str) else method
            name = next((given[key] for key in ("name", "method") if given.get(key) in best), None)
            if name is not None:
                rate = given.get("learning_rate", study["base"]["learning_rate"])
                assert float(rate) == best[name], (file.name, name)


def test_what_is_pooled_of_the_records_is_what_is_pooled_of_the_study(study, made):
    """Values, intervals, deviations and p, of means over rows and over tokens, over seeds of decoding and greedy."""
    of_study, of_records = Committed("prompt", read_study(study), 9).tested(), made.tested()
    for ours, theirs in zip(of_records.evaluations, of_study.evaluations, strict=True):
        assert (ours.model, ours.data) == (theirs.model, theirs.data)
        for name, metric in theirs.metrics.items():
            expected = metric.model_dump(exclude_none=True)
            assert ours.metrics[name].model_dump(exclude_none=True) == pytest.approx(expected, rel=1e-5, abs=3e-5)
    assert len(of_study.differences) == 8
    for mine, other in zip(of_records.differences, of_study.differences, strict=True):
        assert (mine.model, mine.metric, mine.data) == (other.model, other.metric, other.data)
        expected = other.difference.model_dump(exclude_none=True)
        assert mine.difference.model_dump(exclude_none=True) == pytest.approx(expected, rel=1e-5, abs=3e-5)
        assert mine.p_adjusted == pytest.approx(other.p_adjusted, rel=1e-3)
    assert of_records.told_apart == of_study.told_apart
    assert {curve.name for curve in of_study.curves} == set(get_args(Curve.model_fields["name"].annotation))
    for curve, whole in zip(of_records.curves, of_study.curves, strict=True):
        for own, other in zip(curve.points, whole.points, strict=True):
            expected = other.model_dump(exclude={"row_parts"}, exclude_none=True)
            found = own.model_dump(exclude={"row_parts"}, exclude_none=True)
            assert found == pytest.approx(expected, rel=2e-3, abs=0.1)  # a row's part has three digits


def test_absolute_paths_in_a_studys_settings_are_refused(study, tmp_path):
    settings = (study / "config.yaml").read_text()
    for each in study.iterdir():
        if each.is_dir():
            (tmp_path / each.name).symlink_to(each.absolute())
    (tmp_path / "config.yaml").write_text(settings.replace("teacher: t", "teacher: /data/teacher"))
    with pytest.raises(RequestError, match=r"must be relative. Got /data/teacher in "):
        collect(tmp_path, tmp_path / "records")


def test_the_table_marks_the_best_and_claims_by_p_after_holm(made):
    table = metrics_table(made, "test, sampled", made.groups, ["rouge_l"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[0] == ["", "seeds", "ROUGE-L, of 100 ↑", "vs gkd"]
    names = ["gkd", *(f"promptkd, prompt learning rate {rate}" for rate in (0.001, 0.005))]
    assert [line[:2] for line in lines[2:]] == [["teacher", "–"], *([name, "3"] for name in names)]
    best = lines[4]
    assert re.fullmatch(r"\*\*[\d.]+\*\* \[[\d.]+, [\d.]+\] ± [\d.]+", best[2])
    assert re.fullmatch(r"\*\*better\*\* \+[\d.]+ \[[+\d.]+, [+\d.]+\], p [<\d. ]+", best[3])
    assert [line[3] for line in lines[2:4]] == ["–", "baseline"]
    assert "**" not in lines[3][2]
    assert leaders(made, "rouge_l", "test, sampled") == ["promptkd-prompt_learning_rate-0.001"]
    assert leaders(made, "loss", "test, sampled") == []  # the same for all
    with pytest.raises(RequestError, match=r"Study prompt was measured on test, sampled; test, greedy. Got dolly."):
        metrics_table(made, "dolly", made.groups, ["rouge_l"])


def test_a_groups_label_has_the_method_but_not_a_name_that_the_study_gave(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    methods = [{"name": "kd", "grid": {"learning_rate": [1e-5, 2e-5]}}, "gkd"]
    methods += [{"name": "rate", "method": "gkd", "grid": {"learning_rate": [1e-5]}}]
    settings = {"out": "runs/rates", "base": {"student": "s", "teacher": "t", "data": "d"}}
    settings |= {"methods": methods, "seeds": [1]}
    names = [each.name for each in plan_runs(*(settings.get(key, {}) for key in PLANNED), read_file=lambda path: {})]
    collect(made_runs(Path("runs", "rates"), settings, dict.fromkeys(names, 20.0)), Path("records", "rates"))
    study = committed(Path("records", "rates"))
    labels = ["kd, learning rate 1e-05", "kd, learning rate 2e-05", "gkd", "learning rate 1e-05"]
    assert [study.label(group) for group in study.groups] == labels


PAGE = """
{% if has("gone") %}{{ table("gone", "x") }}{% endif %}
{{ table("prompt", "test, sampled") }}
{{ costs("prompt", groups=["promptkd*"]) }}
{{ reached("prompt", 0.8) }}
{{ plot_over("prompt", "prompt_learning_rate", "rouge_l", "test, greedy", levels=["gkd"]) }}
{{ plot_history("prompt", "eval_kl_to_teacher", by_time=True) }}
{{ plot_differences("prompt", "rouge_l", "test, sampled") }}
{{ plot_bias("prompt", "t") }}
{{ plot_bias("prompt", "t", by_step=True) }}
{{ table("prompt", "t", ["exposure_bias"]) }}
value {{ value("prompt", "gkd", "rouge_l", "test, greedy") }} {{ interval("prompt", "gkd", "rouge_l", "test, greedy") }}
best {{ leaders("prompt", "rouge_l", "test, sampled") }} of {{ seeds("prompt") }} seeds
{{ pairs() }}
noticed {{ noticed("prompt", "promptkd-prompt_learning_rate-0.001", "rouge_l", "test, sampled") }}
of {{ differences("prompt") }} differences
least {{ smallest("prompt", "promptkd-prompt_learning_rate-0.001", "rouge_l", "test, sampled") }}
less {{ difference("prompt", "gkd", "rouge_l", "test, sampled", "promptkd-prompt_learning_rate-0.001") }}
seeds {{ by_seed("prompt", "promptkd-prompt_learning_rate-0.001", "rouge_l", "test, sampled") }}.
time {{ ratio("prompt", "gkd", "promptkd-prompt_learning_rate-0.001") }}
after {{ seconds("prompt", "gkd") }} and {{ steps("prompt", "gkd") }} steps
"""


def test_the_table_of_the_log_has_the_first_and_the_last_values_and_what_is_warned_of(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    collect(made_study(Path("runs", "prompt"), [1, 2, 3], steps=40), Path("records", "prompt"))
    short = committed(Path("records", "prompt"))
    lines = log_table(short, short.groups, ["prompt_regularizer", "loss"], count=3).splitlines()
    assert lines[0] == "|  | Prompt regularizer, nats/token | Training loss, nats/token | warnings |"
    gkd, slow, fast = (line.strip("| ").split(" | ") for line in lines[2:])
    assert [gkd[0], gkd[1], gkd[3]] == ["gkd", "–", "none"]
    name = "promptkd, prompt learning rate"
    assert [slow[0], slow[1], slow[3]] == [f"{name} 0.001", "0.100 → 0.100", "none"]
    assert [fast[0], fast[1]] == [f"{name} 0.005", "0.200 → 3.900"]  # a tenth of the step
    assert fast[3] == "prompt KL (3 of 3 seeds, from step 25)"  # above 2.0 for five steps
    with pytest.raises(RequestError, match=r"Records keep 60 steps of a run's log. gkd has 200."):
        log_table(made, made.groups, ["loss"], count=3)


def test_a_page_is_made_of_a_template_and_records(world, tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    made = {str(place): text for place, text in build(world / "records", tmp_path / "page.md").items()}
    page = made.pop("evidence.md")
    source = r"`promptkd study benchmarks/evidence/\S+` \(9 of 9 runs: 12 min 0 s of training, 29.0 s of measuring\)"
    assert len(re.findall(source, page)) == 9
    assert re.search(r"ExAccErr\([2-6]\) on t over optimizer step;", page)  # the length at which it is shown
    assert "| gkd | 3 | " in page.split("ExAccErr, % ↓ |")[1]  # without the teacher, of which it is not measured
    assert "| gkd | 80 | 32.0 s | 2,000 | 1.0 GiB | 0.500 |" in page
    assert "best promptkd-prompt_learning_rate-0.001 of 3 seeds" in page
    assert "after 1 min 20 s and 200 steps" in page
    assert "time 1.0" in page
    of_seeds = [float(each) for each in re.findall(r"[+\d.]+\d", re.search(r"seeds (\+.*)\.", page)[1])]
    assert len(of_seeds) == 3
    assert np.mean(of_seeds) == pytest.approx(float(re.search(r"\*\*better\*\* \+([\d.]+)", page)[1]), abs=0.06)
    assert re.search(r"\| prompt \| cd \| – \| float32 \| .* \| 2\.\d+\.\d+ \|", page)
    better = re.search(r"\*\*better\*\* \+([\d.]+) \[\+([\d.]+), \+([\d.]+)\]", page)
    worse = re.search(r"less \*\*worse\*\* −([\d.]+) \[−([\d.]+), −([\d.]+)\]", page)
    assert sorted(better.groups()) == sorted(worse.groups())
    least = float(re.search(r"least ([\d.]+)", page)[1])
    assert least == pytest.approx((float(better[3]) - float(better[2])) / 2, abs=0.1)
    assert float(re.search(r"noticed ([\d.]+)", page)[1]) == pytest.approx(1.43 * least, abs=0.1)
    assert "of 8 differences" in page
    assert re.search(r"value [\d.]+ \[[\d.]+, [\d.]+\]", page)
    assert re.findall(r"\]\((\S+)\)", page) == list(made)
    assert list(made) == [
        "evidence/prompt-rouge-l-over-prompt-learning-rate-test-greedy.svg",
        "evidence/prompt-eval-kl-to-teacher-over-seconds-of-training.svg",
        "evidence/prompt-rouge-l-differences-test-sampled.svg",
        "evidence/prompt-exposure-bias.svg",
        "evidence/prompt-exposure-bias-over-steps.svg",
    ]
    over = xml.etree.ElementTree.fromstring(next(iter(made.values())))
    texts = [each.text for each in over.iter("{http://www.w3.org/2000/svg}text")]
    assert {"promptkd", "gkd", "ROUGE-L (of 100)", "prompt learning rate", "0.002"} <= set(texts)


def test_a_forest_plot_has_a_row_for_each_difference_about_a_line_at_zero():
    rows = [Interval("near", 0.5, -1.0, 2.0, False), Interval("a far one", 3.0, 2.0, 4.0, True)]
    image = xml.etree.ElementTree.fromstring(forest("differences", rows, Axis("points")))
    texts = [each.text for each in image.iter("{http://www.w3.org/2000/svg}text")]
    assert {"near", "a far one", "points", "0"} <= set(texts)
    near, far = image.iter("{http://www.w3.org/2000/svg}circle")
    unit = (float(far.get("cx")) - float(near.get("cx"))) / 2.5
    (zero,) = [each for each in image.iter("{http://www.w3.org/2000/svg}path") if each.get("stroke-dasharray")]
    assert float(near.get("cx")) - float(re.match(r"M(\S+)", zero.get("d"))[1]) == pytest.approx(unit / 2, abs=0.2)
    assert near.get("fill") != far.get("fill")
    bars = [re.match(r"M(\S+) (\S+)H(\S+)$", each.get("d")) for each in image.iter("{http://www.w3.org/2000/svg}path")]
    spans = [
        (float(bar[3]) - float(bar[1])) / unit for bar in bars if bar and bar[2] in (near.get("cy"), far.get("cy"))
    ]
    assert spans == [pytest.approx(3, abs=0.02), pytest.approx(2, abs=0.02)]


@pytest.mark.parametrize("name", ["kd", "promptkd-abkd", "m" * 30])
def test_the_names_of_a_forest_plot_stay_in_the_image(name):
    image = xml.etree.ElementTree.fromstring(forest("", [Interval(name, 0.5, -1.0, 2.0, False)], Axis("points")))
    (text,) = [each for each in image.iter("{http://www.w3.org/2000/svg}text") if each.text == name]
    assert float(text.get("x")) - 7.2 * len(name) >= 0  # it ends there


def test_the_label_below_a_forest_plot_of_long_names_stays_in_the_image():
    label = "Loss on references (nats/token), minus promptkd"
    image = xml.etree.ElementTree.fromstring(forest("", [Interval("m" * 40, 0.5, -1.0, 2.0, False)], Axis(label)))
    (text,) = [each for each in image.iter("{http://www.w3.org/2000/svg}text") if each.text == label]
    assert float(text.get("x")) + 6.4 * len(label) / 2 <= 400


SVG = "{http://www.w3.org/2000/svg}"


def test_a_scatter_plot_has_a_name_at_each_point_that_covers_no_other_name_and_no_bar():
    values = {"taid": (83.0, 0.74, 0.01), "seqkd": (68.0, 0.74, 0.01), "a": (300.0, 0.65, 0.02)}
    values |= {"promptkd": (280.0, 0.66, 0.005)}
    marks = {name: Mark(Point(x, y, y - reach, y + reach), 0.9 * x, 1.1 * x) for name, (x, y, reach) in values.items()}
    image = xml.etree.ElementTree.fromstring(scatter("costs", marks, Axis("seconds", log=True), Axis("KL")))
    texts = {each.text: each for each in image.iter(f"{SVG}text")}
    dots = {each.get("fill"): (float(each.get("cx")), float(each.get("cy"))) for each in image.iter(f"{SVG}circle")}
    colors = {name: texts[name].get("fill") for name in marks}
    assert dots.keys() == set(colors.values())
    lefts = {name: dots[color][0] for name, color in colors.items()}
    share = (lefts["taid"] - lefts["seqkd"]) / (lefts["a"] - lefts["seqkd"])
    assert share == pytest.approx(np.log(83 / 68) / np.log(300 / 68), abs=1e-3)

    paths = [each.get("d") for each in image.iter(f"{SVG}path") if each.get("stroke") in dots]
    bars = [tuple(map(float, re.findall(r"[\d.]+", path))) for path in paths]
    assert len(bars) == len(marks)
    boxes = [(float(texts[name].get("x")), float(texts[name].get("y")), 6 * len(name)) for name in marks]
    for (x, y, width), (other_x, other_y, other_width) in itertools.combinations(boxes, 2):
        assert abs(y - other_y) >= 12 or x + width <= other_x or other_x + other_width <= x
    for (x, foot, width), (left, high, low, first, level, last) in itertools.product(boxes, bars):
        assert not (x < left < x + width and high < foot and foot - 9 < low)
        assert not (first < x + width and x < last and foot - 9 < level < foot)
    assert all(x >= 44 and x + width <= 400 for x, _, width in boxes)
    assert {"100", "200", "seconds", "KL"} <= texts.keys()


def test_a_scatter_plot_of_long_names_and_of_many_points_in_one_place_is_drawn():
    point = Point(100.0, 0.5, 0.5, 0.5)
    for name in ("m" * 44, "m" * 70):
        marks = {f"{name}{at}": Mark(point, 100.0, 100.0) for at in range(30)}
        image = xml.etree.ElementTree.fromstring(scatter("costs", marks, Axis("seconds", log=True), Axis("KL")))
        assert marks.keys() <= {each.text for each in image.iter(f"{SVG}text")}


@pytest.mark.slow
@pytest.mark.parametrize("study", sorted(each.name for each in (HERE / "studies").glob("*.yaml")))
def test_every_study_can_be_run_as_it_stands(study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("benchmarks").symlink_to(ROOT / "benchmarks")
    for task, files in {"dolly": ("answers", "self_inst", "sni"), "sgd": (), "scitldr": ()}.items():
        for name in ("train", "valid", task, *files):
            rows = Path("runs", "evidence", task, f"{name}.jsonl")
            rows.parent.mkdir(parents=True, exist_ok=True)
            rows.write_text(json.dumps({"instruction": "the", "output": "an"}) + "\n")
    told = done(capsys, "study", Path("benchmarks/evidence/studies", study), "--dry-run").out
    assert re.search(r"of \d+ runs to do", told)


@pytest.mark.parametrize("stage", ["teacher", "tuned", "recovered"])
@pytest.mark.parametrize("task", ["dolly", "sgd", "scitldr"])
def test_every_pair_can_be_made_as_its_files_say(task, stage, tmp_path, monkeypatch):
    """Its settings are accepted; of those that do nothing, a later version may refuse one."""
    monkeypatch.chdir(tmp_path)
    command = "distill" if stage == "recovered" else "sft"
    options = importlib.import_module(f"promptkd.cli.options.{command}")
    parsed = parse_options(command, options, ["--config", str(HERE / task / f"{stage}.yaml"), "--use_cpu"])
    rows = examples_from_rows([{"instruction": "the", "output": "an"}])
    if command == "distill":
        checked(*parsed, read=lambda *source, **how: rows)
    else:
        TrainingRun("sft", *parsed, lambda *source, **how: rows).arguments(FinetuneConfig)


def test_the_page_asks_its_studies_for_what_they_measure(tmp_path, monkeypatch):
    """With made-up records of three methods, on the data sets on which each study measures them.

    One run of one study is missing, and another names no metrics.
    """
    monkeypatch.chdir(tmp_path)
    studies, made = sorted((HERE / "studies").glob("*.yaml")), dict[str, int]()
    for file in studies:
        settings = read_config(file)
        told = ("prompt", "rivals", "stability", "unseen", "variants", "claim", "dialogue")
        if file.stem not in told:
            settings |= {"seeds": [1, 2], "methods": settings["methods"][:3]}
        settings |= {"metrics": []} if file.stem == "stability" else {}
        runs = plan_runs(*(settings.get(key, {}) for key in PLANNED), read_file=lambda path: {})
        names = [each.name for each in runs][: -1 if file.stem == "adapters" else None]
        made_runs(Path("runs", file.stem), settings, dict.fromkeys(names, 20.0), ("teacher", "untrained"), steps=40)
        collect(Path("runs", file.stem), Path("records", file.stem))
        made[file.stem] = len(names)
    counts = {"test rows": 196, "training rows": 1200, "same request": 3}
    counts |= {"request shares words": 7, "response shares words": 0}
    for task in ("dolly", "sgd"):
        Path("records", f"leaks-{task}.json").write_text(json.dumps({task: counts}))
    page = build(Path("records"))[PurePath("evidence.md")]
    assert "| ExAccErr, % ↓ | vs gkd |" in page
    short = page.split("## In short")[1].split("## ")[0]
    assert "\n5. **`kd` and `gkd` differ more" in short
    methods = read_config(HERE / "studies" / "rivals.yaml")["methods"]
    assert f"Of {len(methods)} methods (three seeds) `veto` has" in short
    assert "Of 196 test requests 3 occurs" in " ".join(page.split())
    assert "| kd | 5 |" in build_readme(Path("records"), f"{BEGIN}\n{END}\n")
    rates = page.split("## The learning rates")[1].split("## ")[0]
    assert "|  | 3e-05 | 0.0001 | 0.0003 |" in rates
    assert "| Loss on references, nats/token ↓ |" in page.split("## 3. Stability")[1].split("## ")[0]
    assert f"{duration(2.0 * made['rates'])} of measuring" in rates
    assert all(f"`promptkd study benchmarks/evidence/studies/{file.name}`" in page for file in studies)
    lines = [line.split(" | ") for line in page.split("| about |")[1].splitlines()[2:] if line.startswith("| ")]
    planned = yaml.safe_load((HERE / "planned.yaml").read_text())
    left = {each["study"] for each in planned} - {file.stem for file in studies}
    expected = [[f"| {p['what']}", str(p["runs"] if p["study"] in left else 1)] for p in planned]
    assert [line[:2] for line in lines] == [
        each for each, p in zip(expected, planned, strict=True) if p["study"] in left | {"adapters"}
    ]


def test_what_test_rows_share_with_training_rows_is_counted(tmp_path):
    train = [
        {"instruction": "Name three colours.", "output": "one two three four five six seven eight nine"},
        {"instruction": "Why is the sky blue in the day and red at dusk?", "output": "because"},
    ]
    test = [
        {"instruction": "name THREE colours", "output": "Red."},  # the same request but for its case
        {
            "instruction": "And why is the sky blue in the day?",
            "output": "two three four five six seven eight nine ten",
        },
        {"instruction": "Something else.", "output": "one two three four five six seven"},  # a word too few
    ]
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert counted(read_examples(tmp_path / "test.jsonl"), read_examples(tmp_path / "train.jsonl")) == {
        **{"test rows": 3, "training rows": 2},
        **{"same request": 1, "request shares words": 1, "response shares words": 1},
    }


def test_two_studies_of_a_pair_are_pooled_as_one_over_all_their_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seeds in (("whole", [1, 2, 3, 4]), ("first", [1, 2]), ("second", [3, 4])):
        collect(made_study(Path("runs", name), seeds), Path("records", name))
    whole, first, second = (committed(tmp_path / "records" / name) for name in ("whole", "first", "second"))
    both, expected = first.together(second, whole.groups), whole.tested()
    assert (both.name, both.planned, both.groups[0]) == ("first and second", len(whole.study.runs), whole.groups[0])
    found = both.tested(whole.baseline)
    assert [each.difference for each in found.differences] == [each.difference for each in expected.differences]
    assert [each.p_adjusted for each in found.differences] == [each.p_adjusted for each in expected.differences]
    with pytest.raises(RequestError, match="whole and first have other pairs, or a seed of a group in both"):
        whole.together(first, whole.groups)
    (one, *_) = second.study.runs
    one.trained.models["teacher"].sha256 = "another"
    with pytest.raises(RequestError, match="other pairs"):
        first.together(second, whole.groups)
    asked = """{% set both = together("first", "second", ["gkd", "promptkd-prompt_learning_rate-0.001"]) %}
{{ by_seed(both, "promptkd-prompt_learning_rate-0.001", "rouge_l", "test, greedy") }}"""
    Path("page.md").write_text(asked)
    assert build(tmp_path / "records", Path("page.md"))[PurePath("evidence.md")].count("+") == 4


def test_a_group_with_the_default_joins_the_line_of_those_that_vary_it(world, tmp_path):
    asked = 'plot_over("prompt", "prompt_learning_rate", "rouge_l", "test, greedy", default={"gkd": 0.002})'
    (tmp_path / "page.md").write_text("{{ " + asked + " }}")
    (image,) = (
        xml.etree.ElementTree.fromstring(text)
        for place, text in build(world / "records", tmp_path / "page.md").items()
        if place.suffix == ".svg"
    )
    (line,) = [each.get("d") for each in image.iter(f"{SVG}path") if each.get("stroke-width") == "2"]
    xs = [float(point.split()[0]) for point in line[1:].split("L")]
    assert xs == sorted(xs)
    assert (xs[1] - xs[0]) / (xs[2] - xs[0]) == pytest.approx(1 / 4, abs=0.01)  # 0.001, 0.002, 0.005


def test_a_page_that_asks_for_what_no_record_holds_is_refused(world, tmp_path):
    for asked, told in {
        'value("gone", "gkd", "rouge_l", "test")': "asks for study gone",
        'value("prompt", "kd", "rouge_l", "test, greedy")': "Got kd.",
        'costs("prompt", ["kd"])': "has gkd, promptkd-prompt_learning_rate-0.001",
        'plot_bias("prompt", "t", groups=["kd"])': "Got kd",
        'plot_bias("prompt", "test")': "has no exposure bias on test",
        'plot_over("prompt", "beta", "rouge_l", "test, greedy")': "sets beta",
    }.items():
        (tmp_path / "page.md").write_text("{{ " + asked + " }}")
        with pytest.raises(RequestError, match=told):
            build(world / "records", tmp_path / "page.md")


def test_the_readmes_main_result_stands_between_its_marks(world, tmp_path):
    (tmp_path / "readme.md").write_text('{{ value("prompt", "gkd", "rouge_l", "test, greedy") }} here\n')
    readme = f"before\n{BEGIN}\nan older result\n{END}\nafter\n"
    made = build_readme(world / "records", readme, tmp_path / "readme.md")
    assert re.fullmatch(rf"before\n{BEGIN}\n2\d\.\d here\n{END}\nafter\n", made)
    with pytest.raises(RequestError, match="The README needs the lines"):
        build_readme(world / "records", "before\nafter\n", tmp_path / "readme.md")


@pytest.mark.parametrize("records", COMMITTED, ids=lambda each: each.name)
def test_committed_records_give_a_table_and_are_small(records):
    sizes = [file.stat().st_size for file in records.iterdir()]
    assert max(sizes) < 200_000
    made = committed(records)
    data = made.tested().evaluations[0].data
    table = metrics_table(made, data, made.groups, made.study.options.metrics[:1] or ["loss"])
    assert len(table.splitlines()) == 2 + len(made.groups) + len(made.study.references)


def test_a_drift_of_the_teacher_is_told_of_every_run_that_the_page_says_so_of_and_of_no_other():
    drifting = {"promptkd-lora", "free", *(f"rate-prompt_learning_rate-{rate}" for rate in (0.005, 0.02, 0.1))}
    for name in ("stability", "adapters", "prompt", "rivals", "rates"):
        for run in committed(RECORDS / name).study.runs:
            kinds = {each.kind for series in run.trained.history for each in findings(series.points)}
            assert ("teacher drift" in kinds) == (run.planned.group in drifting), run.planned.name


def test_runs_that_were_repeated_from_scratch_gave_the_same_weights():
    def students(name):
        runs = committed(RECORDS / name).study.runs
        return {run.planned.name: run.measured.models[run.planned.name].sha256 for run in runs}

    first, again = students("prompt") | students("rivals"), students("unseen")
    assert len(again) == len(set(again.values())) == 12
    assert again == {name: first[name] for name in again}


def test_the_page_is_up_to_date_with_its_records():
    assert not outdated(DOCS, RECORDS, README), "Run: python -m benchmarks.evidence"
