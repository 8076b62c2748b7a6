"""A method of the user's own, out of a file: its three forms, its settings, and what is said when it is wrong."""

import re

import pytest

from helpers.commands import World, distill, done, make_world, run
from promptkd.errors import RequestError
from promptkd.methods import METHODS
from promptkd.models.adapters import SoftPromptFactory
from promptkd.responses import ResponseMix
from promptkd.results import Results, file_sha256
from promptkd.training import DistillConfig
from promptkd.training.config import chosen_method

FILE = '''"""Three forms of a method."""

from dataclasses import dataclass
from functools import partial

from beside import halved

from promptkd.methods import Method, MixedMethod, NamedMethod
from promptkd.models.adapters import SoftPromptFactory
from promptkd.objectives import Moving, forward_kl, jensen_shannon, reverse_kl
from promptkd.responses import ResponseMix
from promptkd.settings import option

plain = Method(ResponseMix(0.25), reverse_kl, SoftPromptFactory)
number = 3


def made(share=0.5, *, beta=0.5):
    return Method(ResponseMix(halved(share)), partial(jensen_shannon, beta=beta))


def mean():
    return Method(ResponseMix(0.5), lambda student, teacher: reverse_kl(student, teacher).mean())


def constant():
    return Method(ResponseMix(0.5), lambda student, teacher: reverse_kl(student, teacher).detach())


def failing():
    return Method(ResponseMix(0.5), lambda student, teacher: student.no_such_thing)


def broken(share=0.5):
    return Method(ResponseMix(share), undefined_name)


def nothing():
    return "no method"


class Turning(Moving):
    def before_step(self, progress):
        if progress == 0:
            self.beta = 0.5

    def __call__(self, student, teacher):
        return jensen_shannon(student, teacher, beta=self.beta)


turning = Method(ResponseMix(0.0), Turning())
largest = Method(ResponseMix(0.0), lambda student, teacher: reverse_kl(student.topk(16).values, teacher[:, :16]))


@dataclass(frozen=True, kw_only=True)
class Own(MixedMethod):
    name = "kd"
    own_objective = "forward_kl"
    own_adapter = SoftPromptFactory
    own_share = 1.0

    beta: float = 0.25
    sharpness: float = option(1.0, above=0)

    def build(self, take):
        return Method(ResponseMix(self.share), partial(jensen_shannon, beta=self.beta), self.adapter(take))
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    (tmp_path / "beside.py").write_text("def halved(value):\n    return value / 2\n")
    return path


def method(tmp_path, name, **settings):
    return chosen_method(DistillConfig(str(tmp_path / "run"), method=str(name), use_cpu=True, **settings))


def test_a_method_object(file, tmp_path):
    found = method(tmp_path, f"{file}:plain", prompt_length=3)
    assert found.responses.student_share == 0.25
    assert found.adapter == SoftPromptFactory(prompt_length=3)
    with pytest.raises(RequestError, match=r"takes no beta: its settings are none"):
        method(tmp_path, f"{file}:plain", method_settings={"beta": 1})


@pytest.mark.parametrize("name", ["turning", "largest"])
def test_objectives_that_begin_with_a_step_or_take_the_largest_logits(file, tmp_path, name):
    assert method(tmp_path, f"{file}:{name}").objective is not None


def test_a_function_and_its_arguments(file, tmp_path):
    found = method(tmp_path, f"{file}:made", method_settings={"share": 0.5, "beta": 0.1})
    assert isinstance(found.responses, ResponseMix)
    assert (found.responses.student_share, found.objective.keywords) == (0.25, {"beta": 0.1})
    with pytest.raises(RequestError, match=r"made takes no shared: its settings are share, beta"):
        method(tmp_path, f"{file}:made", method_settings={"shared": 0.5})
    with pytest.raises(RequestError, match=r"made takes no prompt_length"):
        method(tmp_path, f"{file}:made", prompt_length=3)


def test_a_named_method_keeps_its_own_defaults_and_takes_the_runs_settings(file, tmp_path):
    before = dict(METHODS)
    found = method(tmp_path, f"{file}:Own", student_share=0.75, prompt_length=2, method_settings={"sharpness": 2})
    assert found.objective.keywords == {"beta": 0.25}  # not the run's, whose default is another
    assert found.responses.student_share == 0.75
    assert found.adapter == SoftPromptFactory(prompt_length=2)
    assert method(tmp_path, f"{file}:Own", beta=0.5).objective.keywords == {"beta": 0.5}
    assert before == METHODS  # it is called kd, and hides none
    with pytest.raises(RequestError, match=r"Own cannot be built.*sharpness must be above 0"):
        method(tmp_path, f"{file}:Own", method_settings={"sharpness": 0})
    with pytest.raises(RequestError, match=r"takes no mu"):
        method(tmp_path, f"{file}:Own", mu=0.25)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mine.py:lost", r"mine\.py has no lost, which should be a Method.* It has .*plain"),
        ("none.py:made", r"none\.py\. There is no such file"),
        ("mine.py:number", r"must be a Method.* Got the int 3"),
        ("mine.py:nothing", r"must be a Method.* Got the str 'no method'"),
        ("mine.py:mean", r"mean cannot be used: An objective gives one value per token.* Got the shape \(\)"),
        ("mine.py:constant", r"constant cannot be used: An objective gives finite values with a gradient"),
        ("mine.py:failing", r"failing cannot be used \(line 31\): AttributeError"),
        ("mine.py:broken", r"broken cannot be called \(line 35\): NameError: name 'undefined_name'"),
        ("syntax.py:x", r"syntax\.py cannot be run \(line 2\): SyntaxError"),
        ("raises.py:x", r"raises\.py cannot be run \(line 3\): ZeroDivisionError"),
        ("leaves.py:x", r"leaves\.py cannot be run \(line 1\): SystemExit"),
        ("imports.py:x", r"imports\.py cannot be run \(line 1\): ModuleNotFoundError"),
        ("mine:plain", r"Expected a method of .*, or FILE\.py:NAME"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(file, tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "syntax.py").write_text("x = 1\ndef broken(:\n")
    (tmp_path / "raises.py").write_text("x = 1\n\n1 / 0\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "imports.py").write_text("import no_such_module\n")
    with pytest.raises(RequestError, match=told):
        method(tmp_path, name)


def test_settings_of_a_named_method_are_flags(tmp_path):
    with pytest.raises(RequestError, match="method_settings are those of a method of your own"):
        method(tmp_path, "kd", method_settings={"beta": 1})


def test_a_setting_given_as_a_flag_is_shown_where_it_goes(capsys):
    for own in (["--method", "mine.py:made"], ["--method=mine.py:made"]):
        told = run(capsys, "distill", *own, "--weight", "0.3").err
        assert (
            """--weight is unknown. A setting of your own method is given as --method_settings '{"weight": VALUE}'."""
            in told
        )
    assert (
        "method_settings" not in run(capsys, "distill", "--method", "kd", "--weight", "0.3").err.split("weight is")[1]
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
def test_a_run_trains_by_it_records_its_file_and_resumes_with_that_alone(world, file, tmp_path, capsys):
    out, own = tmp_path / "run", ("--method", f"{file}:made", "--method_settings", '{"beta": 0.1}')
    done(capsys, *distill(world, out, *own, "--save_steps", 1))
    record = Results.read(out / "results.json")
    assert record.config["method"] == f"{file}:made"
    assert record.config["method_sha256"] == file_sha256(file)
    assert next(iter(record.training.values())).method == "made"
    done(capsys, "distill", "--out", out, "--resume")
    file.write_text(FILE + "\n# changed\n")
    for again in (["distill", "--out", out, "--resume"], distill(world, out, *own, "--resume")):
        ran = run(capsys, *again)
        assert ran.status == 2
        assert re.search(r"mine\.py has changed since (this|the) run .*began\. Put it back, or start", ran.err)
        assert "sha256" not in ran.err.lower()
    ran = run(capsys, *distill(world, tmp_path / "wrong", "--method", f"{file}:lost"))
    assert (ran.status, (tmp_path / "wrong").exists()) == (2, False)


WRONG = """import torch

from promptkd.methods import Method
from promptkd.models.adapters import TeacherAdapter
from promptkd.objectives import forward_kl
from promptkd.responses import ResponseMix


def raises(student, teacher):
    return student.no_such_thing


def late(objective):  # not when the file is read, where an objective is tried on logits over 1,000 tokens
    return lambda student, teacher: (forward_kl if student.shape[-1] == 1000 else objective)(student, teacher)


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum(-1)

    @staticmethod
    def backward(ctx, upstream):
        raise ArithmeticError("no way back")


class Broken(TeacherAdapter):
    def __init__(self, teacher):
        raise LookupError("no layer")

    def save(self, folder, teacher):
        pass


def at_once(step):
    raise KeyError("no row")


METHODS = {
    "objective": dict(objective=late(raises)),
    "backward": dict(objective=lambda student, teacher: Backward.apply(student - teacher)),
    "detached": dict(objective=late(lambda student, teacher: forward_kl(student, teacher).detach())),
    "adapter": dict(objective=forward_kl, adapter=Broken),
    "loss": dict(loss=at_once),
    "arguments": dict(loss=lambda: 0),
    "nan": dict(objective=late(lambda student, teacher: forward_kl(student, teacher) * float("nan"))),
}


def wrong(what):
    if what == "beside":
        from failing import lost
        return Method(ResponseMix(0.0), loss=lost)
    return Method(ResponseMix(0.0), **METHODS[what])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("objective", r"mine\.py:wrong failed in line 10 of \S*mine\.py: AttributeError: 'Tensor' object has no att"),
        ("backward", r"failed in line 24 of \S*mine\.py: ArithmeticError: no way back"),
        ("beside", r"failed in line 2 of \S*failing\.py: ZeroDivisionError"),
        (
            "detached",
            r"The backward pass of what \S*mine\.py:wrong returned failed: RuntimeError: element 0 of tensors",
        ),
        ("adapter", r"failed in line 29 of \S*mine\.py: LookupError: no layer"),
        ("loss", r"failed in line 36 of \S*mine\.py: KeyError: 'no row'"),
        ("arguments", r"mine\.py:wrong could not be used as it is called here: TypeError: .* takes 0 positional arg"),
        ("nan", r"NaN or infinite on rows .* Look at what \S*mine\.py:wrong computes, these rows, the models and"),
    ],
)
def test_what_fails_while_it_trains_is_told_with_its_file_and_line(world, file, tmp_path, capsys, what, told):
    file.write_text(WRONG)
    if what == "beside":  # folders stay on sys.path, so that another test's would be found first
        (tmp_path / "failing.py").write_text("def lost(step):\n    return 1 / 0\n")
    settings = ("--method", f"{file}:wrong", "--method_settings", f'{{"what": "{what}"}}')
    ran = run(capsys, *distill(world, tmp_path / "run", *settings))
    assert ran.status == 1
    assert re.search(told, ran.err), ran.err
    assert "Run again with --debug" not in ran.err
    if what == "nan":  # it took no step, so that its folder is free, with other settings and the corrected file too
        for way in ([], ["--resume", "--seed", 5]):
            ran = run(capsys, *distill(world, tmp_path / "run", *settings, "--preflight", "false", *way))
            assert ran.status == 1
            assert "took no step, so it is started anew" in ran.err
        (tmp_path / "run" / "notes.txt").write_text("mine")
        ran = run(capsys, *distill(world, tmp_path / "run", *settings))
        assert (ran.status, "is not empty" in ran.err) == (2, True)
