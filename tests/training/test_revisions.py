"""Of a repository on the hub one revision is read: weights, tokenizer with its chat template, and settings."""

import pytest
import transformers

import promptkd.models.source
from helpers.commands import World, distill, done, make_world, sft
from helpers.trainers import config, rows
from promptkd.methods import named_method
from promptkd.training import DistillTrainer

pytestmark = pytest.mark.slow
KINDS = ("AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def asked(world, monkeypatch):
    """What was asked of the hub, as (name, revision, what), where owner/NAME is the world's model."""
    found = set()

    def without_adapter(name, revision=None):
        found.add((name, revision, "adapter"))

    def faked(kind):
        load = getattr(transformers, kind).from_pretrained

        def from_pretrained(name, *arguments, revision=None, **settings):
            if str(name).startswith("owner/"):
                found.add((name, revision, kind))
                name = getattr(world, name.removeprefix("owner/"))
            return load(name, *arguments, **settings)

        return from_pretrained

    monkeypatch.setattr(promptkd.models.source, "find_adapter_config_file", without_adapter)
    for kind in KINDS:
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", faked(kind))
    return found


def everything_of(name, revision):
    return {(name, revision, what) for what in (*KINDS, "adapter")}


STUDENT, TEACHER = everything_of("owner/student", "s2"), everything_of("owner/teacher", "t2")


def test_the_trainer_reads_one_revision_of_each(tmp_path, asked):
    settings = {"model_init_kwargs": {"revision": "s2"}, "teacher_model_revision": "t2"}
    args = config(tmp_path, prompt_learning_rate=1e-3, **settings)
    DistillTrainer("owner/student", "owner/teacher", args, rows(), method=named_method("gkd"))
    assert asked <= STUDENT | TEACHER
    assert {("owner/student", "s2", "AutoTokenizer"), ("owner/teacher", "t2", "AutoTokenizer")} <= asked


@pytest.mark.parametrize(
    ("teacher", "settings", "read"),
    [
        ("owner/teacher", ("--teacher_model_revision", "t2"), STUDENT | TEACHER),
        ("owner/teacher", ("--teacher_model_init_kwargs", '{"revision": "t2"}'), STUDENT | TEACHER),
        ("self", ("--method", "gkd"), STUDENT),
    ],
)
def test_distill_reads_one_revision_of_each(world, tmp_path, capsys, asked, teacher, settings, read):
    names = world._replace(student="owner/student", teacher=teacher)
    given = ("--model_init_kwargs", '{"revision": "s2"}')
    done(capsys, *distill(names, tmp_path / "run", *settings, *given))
    assert asked == read


def test_sft_reads_one_revision(world, tmp_path, capsys, asked):
    names, settings = world._replace(student="owner/student"), ("--model_init_kwargs", '{"revision": "s2"}')
    done(capsys, *sft(names, tmp_path / "run", *settings))
    assert asked == {each for each in STUDENT if each[2] != "GenerationConfig"}
