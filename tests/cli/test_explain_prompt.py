"""`promptkd explain-prompt` on a tiny run, from the command to the section on the run's page."""

import shutil
from pathlib import Path

import pytest

from helpers.commands import PROMPT_FILES, World, distill, done, held, json_lines, make_world, run, write_rows
from helpers.pages import Page
from promptkd.cli import main
from promptkd.cli.prompt_run import PromptRun
from promptkd.errors import RequestError
from promptkd.io.atomic import remove
from promptkd.models import load_model, model_record
from promptkd.results import Results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: World) -> Path:
    """A run with a soft prompt and validation rows."""
    out = world.folder / "run"
    request = distill(world, out, "--eval-data", world.valid, "--prompt_length", 3)
    assert main([str(each) for each in request]) == 0
    return out


def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_it_writes_a_record_that_the_report_shows(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    before = held(folder)
    ran = done(capsys, "explain-prompt", folder, "--rows", 2)
    assert held(folder) - before == {"explain-prompt/results.json"}
    record = Results.read(folder / "explain-prompt" / "results.json")
    (explained,) = record.prompts
    assert explained.folder == "prompt"
    assert [each.start for each in explained.vectors] == ["S", "u", "p"]  # Suppose …
    assert all(each.nearest[0].token == each.start for each in explained.vectors)  # three steps do not move them far
    assert all(0 < each.distance < 0.1 and len(each.nearest) == 5 for each in explained.vectors)
    assert [each.row for each in explained.answers] == [0, 1]
    assert all({each.plain, each.prompted, each.student} != {""} for each in explained.answers)
    assert set(explained.kl) == {"prompted_to_plain", "prompted_to_student", "plain_to_student"}
    assert explained.kl["prompted_to_plain"].whole.rows == 4
    assert explained.kl["prompted_to_plain"].whole.value > 0
    assert set(record.models) == {"student", "teacher"}
    assert any("what the student itself writes for 4 requests" in note for note in record.notes)
    assert '"S" 1.00' in ran.out
    assert "prompted || plain" in ran.out
    assert "teacher with the prompt" in ran.out
    assert "Row 1: the 21" in ran.out

    page = tmp_path / "report.html"
    done(capsys, "report", folder, "--out", page)
    read = Page(page.read_text(encoding="utf-8"))
    assert read.title == "Distill report"
    assert ("section", "id", "prompt") in read.attributes
    assert "Still nearest to the token of their start: 3 of 3 vectors." in read.text
    (plot,) = read.data["prompts"]
    assert [each["label"] for each in plot["curves"]] == [
        "prompted || plain",
        "prompted || student",
        "plain || student",
    ]
    first = explained.kl["prompted_to_plain"].positions[0]
    assert plot["curves"][0]["points"][0] == [1.0, first.value, first.low, first.high, "1"]
    done(capsys, "report", finished, "--out", page, "--overwrite")
    assert 'id="prompt"' not in page.read_text(encoding="utf-8")

    again = run(capsys, "explain-prompt", folder)
    assert again.status == 2
    assert "--overwrite" in again.err


def test_other_rows_another_folder_and_no_answers(finished, world, tmp_path, capsys):
    rows = write_rows(tmp_path / "asked.jsonl", [{"prompt": "the an", "note": "b"}, {"prompt": "a"}, {"prompt": "b"}])
    out = tmp_path / "explained"
    ran = done(capsys, "explain-prompt", finished, "--data", rows, "--rows", 0, "--limit", 2, "--out", out)
    assert "context" not in ran.err
    assert held(out) == {"results.json"}
    (explained,) = Results.read(out / "results.json").prompts
    assert explained.answers == []
    assert explained.kl["plain_to_student"].whole.rows == 2
    assert not (finished / "explain-prompt").exists()


def test_the_teacher_reads_its_context_as_in_training(world, tmp_path, capsys):
    folder, text = tmp_path / "run", "the {{ input }}an"
    request = distill(world, folder, "--eval-data", world.valid, "--prompt_length", 3)
    done(capsys, *request, "--teacher_prompt", text)

    def explained(name, *arguments):
        ran = done(capsys, "explain-prompt", folder, "--out", tmp_path / name, *arguments)
        return ran.err, Results.read(tmp_path / name / "results.json")

    told, read = explained("read")
    assert "4 rows have a context that only the teacher reads" in told
    assert read.models["teacher"].context == text
    assert any("with the prompt and without, reads the rows' context" in note for note in read.notes)
    columns = [{**row, "teacher_prompt": f"the {row['input']}an"} for row in json_lines(Path(world.valid))]
    _, of_column = explained("column", "--data", write_rows(tmp_path / "column.jsonl", columns))
    assert of_column.prompts == read.prompts
    lacking = write_rows(tmp_path / "lacking.jsonl", [{"prompt": "the an"}])
    told, without = explained("without", "--data", lacking)
    assert "the context is left out, since not every row has what it is made of" in told
    assert "In training the teacher read a context of its own (teacher_prompt)" in "\n".join(without.notes)
    assert without.models["teacher"].context == ""
    record = Results.read(folder / "results.json")
    record.config["teacher_prompt"] = None
    record.write(folder / "results.json")
    _, plain = explained("plain")
    for name in ("prompted_to_plain", "plain_to_student"):
        assert plain.prompts[0].kl[name] != read.prompts[0].kl[name]
    assert [each.student for each in plain.prompts[0].answers] == [each.student for each in read.prompts[0].answers]
    assert [each.plain for each in plain.prompts[0].answers] != [each.plain for each in read.prompts[0].answers]


def test_runs_without_a_soft_prompt_are_refused_in_a_sentence(finished, tmp_path):
    folder = copied(finished, tmp_path)
    remove(folder / "prompt")
    for place, told in (
        ("teacher_lora", "trained LoRA weights in its teacher"),
        ("teacher", "trained all weights of its teacher"),
        ("online_module", "trained an online module in its teacher"),
        (None, "trained nothing in its teacher"),
    ):
        if place is not None:
            (folder / place).mkdir()
        with pytest.raises(RequestError, match=f"Expected a run with a soft prompt.*{told}"):
            PromptRun(folder)
        if place is not None:
            (folder / place).rmdir()
    (folder / "results.json").unlink()
    with pytest.raises(RequestError, match=r"has no results\.json"):
        PromptRun(folder)
    with pytest.raises(RequestError, match="is no folder"):
        PromptRun(tmp_path / "nowhere")


def test_a_teacher_or_rows_that_are_gone_or_changed_are_told(finished, world, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    explained = PromptRun(folder)
    assert explained.teacher(None) == world.teacher
    with pytest.raises(RequestError, match="is another model than the teacher of the run"):
        explained.teacher(world.other)
    record = explained.record
    record.models["teacher"].path = str(tmp_path / "moved")
    with pytest.raises(RequestError, match=r"moved, cannot be read: .* If it was moved, give it by --teacher PATH"):
        explained.teacher(None)
    assert explained.teacher(world.teacher) == world.teacher

    assert explained.data(None) == world.valid
    assert explained.data("other.jsonl") == "other.jsonl"
    valid = Path(shutil.copy(world.valid, tmp_path / "valid.jsonl"))
    record.data["validation"].path = str(valid)
    assert explained.data(None) == str(valid)
    valid.write_text('{"prompt": "a"}\n', encoding="utf-8")
    with pytest.raises(RequestError, match=r"has changed since .* use it as it is now: --data"):
        explained.data(None)
    valid.unlink()
    with pytest.raises(RequestError, match=r"are not there\. .* give rows by --data FILE"):
        explained.data(None)
    del record.data["validation"]
    with pytest.raises(RequestError, match="had no validation rows"):
        explained.data(None)


def test_the_start_of_a_method_of_ones_own_is_not_guessed(finished, tmp_path):
    explained = PromptRun(finished)
    assert explained.start() == {"start": "text", "text": "Suppose you are a student.", "seed": 42}
    explained.record.config["method"] = "mine.py:own"
    assert explained.start() is None


def test_a_prompt_of_a_moving_average_is_not_read_with_another_model(finished):
    explained = PromptRun(finished)
    explained.record.config["teacher"] = "ema"
    for given in (None, str(finished)):
        with pytest.raises(RequestError, match="was a moving average of its student, whose weights a run does not"):
            explained.teacher(given)


@pytest.fixture
def several(finished, tmp_path):
    """The run with its prompt as that of two teachers, of which its record says nothing."""
    folder = copied(finished, tmp_path)
    (folder / "prompt").rename(folder / "kept")
    for name in ("big", "small"):
        shutil.copytree(folder / "kept", folder / "prompt" / name)
    return PromptRun(folder)


def test_each_of_several_teachers_is_given_by_its_name(several, world):
    record = several.record
    for name, place in (("big", world.teacher), ("small", world.other)):
        record.models[f"teacher {name}"] = model_record(place, load_model(place))
    assert several.teachers(None) == {"big": world.teacher, "small": world.other}
    record.models["teacher small"].path = str(several.folder / "moved")
    with pytest.raises(RequestError, match=r"teacher small .* If it was moved, give it by --teacher small=PATH"):
        several.teachers(None)
    assert several.teachers([f"small={world.other}"]) == {"big": world.teacher, "small": world.other}
    assert several.teachers(f"small={world.other}") == {"big": world.teacher, "small": world.other}
    with pytest.raises(RequestError, match=r"than the teacher small .* fits that one alone: .* --teacher small=PATH"):
        several.teachers(f"small={world.teacher}")
    with pytest.raises(RequestError, match=r"has no teacher 'teacher', but big, small\. .* --teacher NAME=PATH"):
        several.teachers(world.teacher)
    with pytest.raises(RequestError, match="small is given twice"):
        several.teachers([f"small={world.other}"] * 2)


def test_a_teacher_that_the_record_does_not_name_may_be_given(several, finished, world):
    with pytest.raises(RequestError, match=r"names no teacher big\. Give it by --teacher big=PATH"):
        several.teachers(None)
    both = {"big": world.teacher, "small": world.other}
    assert several.teachers([f"{name}={place}" for name, place in both.items()]) == both
    with pytest.raises(RequestError, match=r"has one teacher\. Give one --teacher PATH"):
        PromptRun(finished).teachers([world.teacher, world.other])
    assert PromptRun(finished).teachers(world.teacher) == {"": world.teacher}


def test_prompts_of_several_teachers_are_found_by_name(several):
    folder, found = several.folder, several.prompts
    assert found == {name: folder / "prompt" / name for name in ("big", "small")}
    assert {each.name for each in found["big"].iterdir()} == PROMPT_FILES


def test_the_teacher_is_loaded_as_in_the_run_unless_told_otherwise(world, tmp_path, capsys, monkeypatch):
    """But for its revision, which is known already."""
    out, settings = tmp_path / "run", []
    own = ("--teacher_model_init_kwargs", '{"device_map": {"": "cpu"}, "revision": "main"}')
    done(capsys, *distill(world, out, "--eval-data", world.valid, "--prompt_length", 3, *own))

    def load(name, **given):
        settings.append(given)
        return load_model(name, **given)

    monkeypatch.setattr("promptkd.cli.inference_run.load_model", load)
    done(capsys, "explain-prompt", out, "--rows", 0)
    assert settings.pop() | {"dtype": ""} == {
        **{"dtype": "", "trust_remote_code": False},
        **{"device_map": {"": "cpu"}, "revision": "main"},
    }
    done(capsys, "explain-prompt", out, "--rows", 0, "--teacher-model-init-kwargs", "{}", "--overwrite")
    assert "device_map" not in settings.pop()
