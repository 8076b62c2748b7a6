"""The command-line framework, with a toy command: each rule of flags, files, help, messages and exit statuses."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import promptkd.cli.commands
import promptkd.cli.options
from promptkd import cli
from promptkd.cli.parsing.config_file import read_config, write_config
from promptkd.cli.parsing.parser import Parsed, merged_config, parse_options
from promptkd.errors import PromptKDError, RequestError

TOY = '''"""Do something with a model.

It takes these two lines
and fills them into one paragraph.

    promptkd toy --model M --data D   # an example, as it stands
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from promptkd.errors import PromptKDError, RequestError
from promptkd.settings import option

TRAINING_CONFIG = "toy_lazy:ToyConfig"
SETTINGS_SOURCES = ("toy_training.py",)
COMMON_TRAINING_FLAGS = ("max_steps", "learning_rate", "tracker")


@dataclass
class Base:
    model: str
    """Folder or hub name of the model."""


@dataclass
class Options(Base):
    data: list[Path]
    """Files of rows."""
    max_prompt_length: int = 256
    """Longest prompt, in tokens"""
    temperature: float = 1.0
    """Of the samples; 0 is greedy."""
    packing: bool = True
    """Several rows in one."""
    direction: Literal["forward", "reverse"] = "reverse"
    """Which divergence."""
    out: Path = Path("run")
    """Where the result goes."""
    limit: int | None = None
    """How many rows, all by default."""
    seeds: list[int] = field(default_factory=lambda: [10, 20])
    """Seeds."""
    extra: dict = field(default_factory=dict)
    """More settings."""
    name: str | None = None
    rows: list[int] | None = option(None, at_least=1)
    share: float = option(1.0, above=0, at_most=1)
    layers: int = option(2, at_least=1, at_most=30)
    fail: str = ""

    def __post_init__(self):
        if self.fail == "cross-check":
            raise RequestError("Two options do not go together.")


def run(options, training):
    if options.fail == "run":
        raise PromptKDError("Expected a finite loss. Got nan at step 3. Lower --learning-rate.")
    if options.fail == "bug":
        raise ValueError("shapes differ:\\n  (1,) and (2,)")
    if options.fail == "interrupt":
        raise KeyboardInterrupt
    if options.fail == "socket":
        raise BrokenPipeError(32, "the server hung up")
    if options.fail == "pipe":
        for _ in range(100_000):
            print("a line")
    print("ran", options.model)
'''

TOY_TRAINING = '''
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from promptkd.settings import option

Tracker = Literal["wandb", "trackio"]


class Scheduler(str, Enum):
    LINEAR = "linear"
    COSINE = "cosine"


class Parallel: ...


@dataclass
class ToyConfig:
    learning_rate: float = option(1e-6, above=0)
    """Initial learning rate."""
    max_steps: int = -1
    """Steps; -1 for whole epochs."""
    tracker: Tracker | None = None
    """Where metrics go, beside
    the log."""
    debug: str = field(default="", metadata={"help": "A setting of another library."})
    lr_scheduler_type: Scheduler | str = "linear"
    scheduler: Scheduler = Scheduler.LINEAR
    deepspeed: dict | str | None = None
    liger_kernel_config: dict[str, bool] | None = None
    report_to: None | str | list[str] = "none"
    run_name: str | None = None
    eval_steps: float | None = None
    bf16: bool | None = None
    tokens_seen: str | bool = "no"
    pad_to: int | str | None = "auto"
    parallelism: Parallel | None = None
    hub_token: str | None = None
    computed: int = field(default=0, init=False)
'''

TOY_LAZY = """
def __getattr__(name):  # as packages do that import their parts on demand
    import toy_training

    return vars(toy_training)[name]
"""

LOOSE = '''"""Take runs."""

from dataclasses import dataclass
from pathlib import Path

POSITIONAL = "runs"


@dataclass
class Options:
    runs: list[Path]
    """Folders of runs."""
    out: Path = Path("report.html")
    open: bool = False
    title: str = ""


def run(options, training): ...
'''

REQUIRED = ["--model", "M", "--data", "D"]


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    texts = {"toy_training": TOY_TRAINING, "toy_lazy": TOY_LAZY}
    for package in ("options", "commands"):
        (folder / package).mkdir()
        texts |= {f"{package}/toy": TOY, f"{package}/loose": LOOSE}
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def toys(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(toy_folder))
    monkeypatch.setitem(cli.COMMANDS, "toy", "Do something.")
    monkeypatch.setitem(cli.COMMANDS, "loose", "Take runs.")
    for package in (promptkd.cli.options, promptkd.cli.commands):
        folder = toy_folder / package.__name__.rpartition(".")[2]
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")  # so that main's defaults do not outlive the test
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def parse(*arguments: str, command: str = "toy") -> Parsed:
    module = importlib.import_module(f"promptkd.cli.options.{command}")
    assert isinstance(module, ModuleType)
    return parse_options(command, module, arguments)


def own(*arguments: str) -> Any:
    return parse(*REQUIRED, *arguments).options


def training(*arguments: str) -> dict[str, Any]:
    return parse(*REQUIRED, *arguments).training


def wrong(*arguments: str, command: str = "toy") -> str:
    with pytest.raises(RequestError) as caught:
        parse(*arguments, command=command)
    return str(caught.value)


@pytest.fixture
def config(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "toy.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def subprocess_main(
    folder: Path, *arguments: str, before: str = "", after: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `main` in a fresh interpreter with the toy command in the table; `after` sees `status`."""
    script = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n{before}\n"
        "from promptkd.cli import commands, options\nfrom promptkd import cli\ncli.COMMANDS['toy'] = 'Do something.'\n"
        f"options.__path__.append({str(folder / 'options')!r})\n"
        f"commands.__path__.append({str(folder / 'commands')!r})\n"
        f"status = cli.main({list(arguments)!r})\n{after}\nsys.exit(status)\n"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


# Flags


def test_defaults_stand_where_nothing_is_given() -> None:
    parsed = parse(*REQUIRED)
    assert vars(parsed.options) == {
        "model": "M",
        "data": [Path("D")],
        "max_prompt_length": 256,
        "temperature": 1.0,
        "packing": True,
        "direction": "reverse",
        "out": Path("run"),
        "limit": None,
        "seeds": [10, 20],
        "extra": {},
        "name": None,
        "rows": None,
        "share": 1.0,
        "layers": 2,
        "fail": "",
    }
    assert parsed.training == {}


@pytest.mark.parametrize(
    "spelling", [["--max-prompt-length", "8"], ["--max_prompt_length", "8"], ["--max-prompt_length=8"]]
)
def test_either_spelling_and_either_form_of_a_value(spelling: list[str]) -> None:
    assert own(*spelling).max_prompt_length == 8


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--packing"], True),
        (["--no-packing"], False),
        (["--no_packing"], False),
        (["--packing", "false"], False),
        (["--packing=False"], False),
        (["--packing", "true", "--out", "x"], True),
    ],
)
def test_booleans(arguments: list[str], expected: bool) -> None:
    assert own(*arguments).packing is expected


def test_lists_take_the_values_up_to_the_next_flag() -> None:
    parsed = parse("--data", "A", "B", "--seeds", "1", "-2", "--model", "M")
    assert parsed.options.data == [Path("A"), Path("B")]
    assert parsed.options.seeds == [1, -2]


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--temperature", "2e-5"], "temperature", 2e-5),
        (["--temperature", "-.5"], "temperature", -0.5),
        (["--temperature", "1"], "temperature", 1.0),
        (["--limit", "5"], "limit", 5),
        (["--limit", "none"], "limit", None),
        (["--limit", "null"], "limit", None),
        (["--name", "None"], "name", None),
        (["--name=--odd"], "name", "--odd"),
        (["--name="], "name", ""),
        (["--name=a=b"], "name", "a=b"),
        (["--direction", "forward"], "direction", "forward"),
        (["--out", "~/x"], "out", Path("~/x").expanduser()),
        (["--extra", '{"a": 1e-5, "b": [true, null]}'], "extra", {"a": 1e-5, "b": [True, None]}),
        (["--extra", "{a: text}"], "extra", {"a": "text"}),
        (["--extra", "a: {b: 2}"], "extra", {"a": {"b": 2}}),
    ],
)
def test_values_become_what_the_annotation_asks(arguments: list[str], name: str, value: Any) -> None:
    found = vars(own(*arguments))[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-prompt-length", "1.5"], "--max-prompt-length expects a whole number. Got '1.5'."),
        (["--max-prompt-length", "true"], "--max-prompt-length expects a whole number. Got 'true'."),
        (["--max-prompt-length"], "--max-prompt-length expects a whole number. Got no value."),
        (["--max-prompt-length="], "--max-prompt-length expects a whole number. Got nothing."),
        (["--temperature", "nan"], "--temperature expects a finite number. Got 'nan'."),
        (["--temperature", "inf"], "--temperature expects a finite number. Got 'inf'."),
        (["--temperature", "1e999"], "--temperature expects a finite number. Got '1e999'."),
        (["--temperature", "none"], "--temperature expects a finite number. Got 'none'."),
        (["--limit", "many"], "--limit expects a whole number or none. Got 'many'."),
        (["--packing", "yes"], "--packing expects true or false. Got 'yes'."),
        (["--no-packing", "true"], "Did not expect true: --no-packing takes no value."),
        (["--no-limit"], "--no-limit is unknown: --limit expects a whole number or none."),
        (["--direction", "sideways"], "--direction expects one of forward, reverse. Got 'sideways'."),
        (["--out="], "--out expects a path. Got nothing."),
        (["--seeds", "1", "b"], "--seeds expects one or more values, each a whole number. Got 1 b."),
        (["--seeds"], "--seeds expects one or more values, each a whole number. Got no value."),
        (["--extra", "word"], "--extra expects a mapping such as {\"key\": 1}. Got 'word'."),
        (["--extra", '{"a": '], '--extra expects a mapping such as {"key": 1}. Got \'{"a": \'.'),
        (["--rows", "1", "0", "-2"], "--rows must be at least 1. Got 1 0 -2."),
        (["--share", "0"], "--share must lie above 0 and at most at 1. Got 0."),
        (["--share", "1.5"], "--share must lie above 0 and at most at 1. Got 1.5."),
        (["--layers", "31"], "--layers must lie in [1, 30]. Got 31."),
        (["--name", "a", "b"], "Did not expect b: --name takes one value."),
        (["--name", "a", "--name", "a"], "--name is given twice. Give it once."),
        (["--seeds", "1", "--seeds", "2"], "--seeds is given twice. Give the values together: --flag A B."),
        (["--packing", "--no-packing"], "--no-packing is given twice, first as --packing."),
        (["--max_prompt_length=1", "--max-prompt-length=1"], "is given twice, first as --max_prompt_length"),
        (["-o", "x"], "-o is no flag: flags begin with two dashes and a name."),
        (["--", "x"], "-- is no flag: flags begin with two dashes and a name."),
        (["--max-prompt", "8"], "--max-prompt is unknown. Did you mean --max-prompt-length?"),
        (["--lerning_rate", "8"], "--lerning_rate is unknown. Did you mean --learning-rate?"),
        (["--confg", "8"], "--confg is unknown. Did you mean --config?"),
        (["--qqq"], "--qqq is unknown. --help-all lists every name."),
        (["--computed", "1"], "--computed is unknown."),
        (["--debug=x"], "--debug takes no value: it shows the traceback"),
        (["--config"], "--config expects a YAML file. Got no value."),
        (["--config", "a", "--config", "b"], "--config is given twice. Put everything into one file."),
    ],
)
def test_a_wrong_flag_says_what_was_expected_and_what_came(arguments: list[str], message: str) -> None:
    text = wrong(*REQUIRED, *arguments)
    assert message in text
    assert "`promptkd toy --help`" in text


def test_a_value_before_any_flag_is_refused() -> None:
    assert "Did not expect M D: every value follows a flag." in wrong("M", "D")


def test_everything_wrong_is_reported_at_once_a_line_each() -> None:
    lines = wrong("--temperature", "hot", "--oot", "x").splitlines()
    assert lines == [
        "4 things are wrong with the request:",
        "  - --temperature expects a finite number. Got 'hot'.",
        "  - --oot is unknown. Did you mean --out?",
        "  - --data is missing: Files of rows.",
        "  - --model is missing: Folder or hub name of the model.",
        "`promptkd toy --help` explains the flags.",
    ]


def test_a_required_flag_with_a_wrong_value_is_not_missing_too() -> None:
    assert "missing" not in wrong("--model", "--data", "D")


def test_a_cross_check_of_the_options_passes_through() -> None:
    assert wrong(*REQUIRED, "--fail", "cross-check") == "Two options do not go together."


# Arguments that follow no flag


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [
        (["A"], ["A"]),
        (["A", "B", "--out", "o"], ["A", "B"]),
        (["--out", "o", "A", "B"], ["A", "B"]),
        (["A", "--open", "B", "--title", "t", "C"], ["A", "B", "C"]),
        (["--runs", "A", "B"], ["A", "B"]),
    ],
)
def test_positional_option(arguments: list[str], runs: list[str]) -> None:
    options = parse(*arguments, command="loose").options
    assert options.runs == [Path(run) for run in runs]
    assert options.open is ("--open" in arguments)


def test_positional_option_is_required_and_given_in_one_place() -> None:
    assert "RUNS is missing: Folders of runs." in wrong(command="loose")
    assert "A is given twice, first as --runs." in wrong("A", "--runs", "B", command="loose")
    assert "RUNS expects one or more values, each a path. Got A " in wrong("A", "", command="loose")


def test_a_command_without_training_config_knows_no_training_flags() -> None:
    assert "--learning-rate is unknown." in wrong("A", "--learning-rate", "1", command="loose")


# Training flags


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--learning-rate", "2e-5"], {"learning_rate": 2e-5}),
        (["--learning_rate=1e-6"], {"learning_rate": 1e-6}),  # the default, but given
        (["--max_steps", "-1"], {"max_steps": -1}),
        (["--lr-scheduler-type", "cosine"], {"lr_scheduler_type": "cosine"}),
        (["--deepspeed", "ds.json"], {"deepspeed": "ds.json"}),
        (["--deepspeed", '{"zero": 2}'], {"deepspeed": {"zero": 2}}),
        (["--liger-kernel-config", '{"rope": true}'], {"liger_kernel_config": {"rope": True}}),
        (["--report-to", "none"], {"report_to": "none"}),
        (["--report-to", "wandb"], {"report_to": "wandb"}),
        (["--report-to", "wandb", "trackio"], {"report_to": ["wandb", "trackio"]}),
        (["--run-name", "none"], {"run_name": None}),
        (["--eval-steps", "5"], {"eval_steps": 5.0}),
        (["--bf16"], {"bf16": True}),
        (["--no-bf16"], {"bf16": False}),
        (["--bf16", "none"], {"bf16": None}),
        (["--tokens-seen", "all"], {"tokens_seen": "all"}),
        (["--tokens-seen", "true"], {"tokens_seen": True}),
        (["--tokens-seen", "no"], {"tokens_seen": "no"}),
        (["--pad-to", "8"], {"pad_to": 8}),
        (["--pad-to", "auto"], {"pad_to": "auto"}),
    ],
)
def test_training_flags_hold_only_what_was_given(arguments: list[str], expected: dict[str, Any]) -> None:
    found = training(*arguments)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


def test_an_enumeration_without_text_becomes_its_member() -> None:
    member = training("--scheduler", "cosine")["scheduler"]
    assert member is importlib.import_module("toy_training").Scheduler.COSINE
    assert merged_config(own(), {"scheduler": member})["scheduler"] == "cosine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr-scheduler-type", "cosin"], "expects one of linear, cosine. Got 'cosin'. Did you mean cosine?"),
        (["--deepspeed", '{"zero": '], "--deepspeed expects a mapping"),
        (["--liger-kernel-config", '{"rope": 3}'], "--liger-kernel-config expects a mapping"),
        (["--parallelism", "x"], "expects a Python object (Parallel) that neither a flag nor a file can give or none."),
    ],
)
def test_wrong_training_flags(arguments: list[str], message: str) -> None:
    assert message in wrong(*REQUIRED, *arguments)


# The file


def test_flags_win_over_the_file_and_the_file_over_the_defaults(config) -> None:
    path = config(
        "model: F\ndata: [A, B]\nmax-prompt-length: 8\ntemperature: 2e-5\nlearning_rate: 3e-4\nmax_steps: 7\n"
    )
    parsed = parse("--config", path, "--model", "M", "--max_steps=9")
    assert parsed.options.model == "M"
    assert parsed.options.data == [Path("A"), Path("B")]
    assert parsed.options.max_prompt_length == 8
    assert parsed.options.temperature == 2e-5
    assert parsed.options.seeds == [10, 20]
    assert parsed.training == {"learning_rate": 3e-4, "max_steps": 9}


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("tokens_seen: no", "tokens_seen", "no"),  # YAML 1.1 reads false
        ("run_name: 2024-01-31", "run_name", "2024-01-31"),  # and a date
        ("run_name: 1:30", "run_name", "1:30"),  # and 90
        ("run_name: '7'", "run_name", "7"),
        ("run_name: null", "run_name", None),
        ("max_steps: 010", "max_steps", 10),  # and 8
        ("learning_rate: 1", "learning_rate", 1.0),
        ("learning_rate: '2e-5'", "learning_rate", 2e-5),
        ("learning_rate: 2E-5", "learning_rate", 2e-5),
        ("report_to: none", "report_to", "none"),
        ("report_to: [a, b]", "report_to", ["a", "b"]),
        ("deepspeed: {stage: 2, rate: 1e-3}", "deepspeed", {"stage": 2, "rate": 1e-3}),
        ("debug: overflow", "debug", "overflow"),
    ],
)
def test_values_of_the_file(config, line: str, name: str, value: Any) -> None:
    found = training("--config", config(line + "\n"))[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "toy.yaml: expected a mapping such as `learning_rate: 2e-5` at the top. Got a list."),
        ("word\n", "Got a str."),
        ("# nothing\n", "Got an empty file."),
        ("model: M\nout: [a\n", "toy.yaml, line 3: not readable as YAML:"),
        ("model: M\n\tout: x\n", "toy.yaml, line 2: not readable as YAML:"),
        ("a: !!python/name:os.system\n", "toy.yaml, line 1: not readable as YAML:"),
        ("model: M\nmodel: N\n", "toy.yaml, line 2: not readable as YAML: duplicate key 'model'."),
        ("extra: {a: 1, a: 2}\n", "duplicate key 'a'"),
        ("max-steps: 1\nmax_steps: 1\n", "toy.yaml: duplicate key max_steps, once spelled max_steps."),
        ("max_prompt_lenght: 8\n", "toy.yaml: the key max_prompt_lenght is unknown. Did you mean max_prompt_length?"),
        ("lerning-rate: 8\n", "toy.yaml: the key lerning_rate is unknown. Did you mean learning_rate?"),
        ("7: 8\n", "toy.yaml: the key 7 is unknown."),
        ("config: other.yaml\n", "toy.yaml: the key config is unknown."),
        ("temperature: .nan\n", "toy.yaml: temperature expects a finite number. Got '.nan'."),
        ("max_prompt_length: 1.5\n", "toy.yaml: max_prompt_length expects a whole number. Got 1.5."),
        ("max_prompt_length: true\n", "toy.yaml: max_prompt_length expects a whole number. Got True."),
        ("max_prompt_length:\n", "toy.yaml: max_prompt_length expects a whole number. Got nothing."),
        ("packing: no\n", "toy.yaml: packing expects true or false. Got 'no'."),
        ("packing: 1\n", "toy.yaml: packing expects true or false. Got 1."),
        ("layers: 0\n", "toy.yaml: layers must lie in [1, 30]. Got 0."),
        ("name: 7\n", "toy.yaml: name expects text or none. Got 7. Put it in quotes."),
        ("name: [a]\n", "toy.yaml: name expects text or none. Got a."),
        ("model: 7\n", "toy.yaml: model expects text. Got 7."),  # wrong, though --model wins over it
    ],
)
def test_a_wrong_file_names_itself_and_the_place(config, text: str, message: str) -> None:
    assert message in wrong(*REQUIRED, "--config", config(text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert f"--config expects a YAML file. {missing}: No such file or directory." in wrong("--config", str(missing))
    assert "it is a folder" in wrong("--config", str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    assert "UTF-8" in wrong("--config", str(tmp_path / "latin.yaml"))


def test_problems_of_file_and_flags_are_reported_together(config) -> None:
    text = wrong("--config", config("nme: a\nlimit: x\n"), "--model", "M", "--oot", "x")
    assert text.startswith("4 things are wrong")
    for part in ("--oot", "nme", "limit", "--data is missing"):
        assert part in text


def test_a_key_may_override_a_merged_one(config) -> None:
    path = config("extra: {base: &b {a: 1, c: 2}, over: {<<: *b, a: 3}}\n")
    assert own("--config", path).extra["over"] == {"a": 3, "c": 2}


# The merged configuration


def test_the_merged_configuration_repeats_the_run(tmp_path: Path) -> None:
    odd = ["--name", "2e-5", "--extra", '{"a": "no", "b": "1", "c": "010", "d": null, "e": "1:30", "f": "λ"}']
    first = parse(*REQUIRED, *odd, "--no-packing", "--learning-rate", "2e-5", "--deepspeed", '{"stage": 2}')
    path = tmp_path / "new" / "config.yaml"
    write_config(path, merged_config(*first))
    second = parse("--config", str(path))
    assert second == first
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]


def test_the_merged_configuration_is_plain_and_holds_only_given_training_values() -> None:
    merged = merged_config(*parse(*REQUIRED, "--max-steps", "3"))
    assert merged["data"] == ["D"]
    assert merged["out"] == "run"
    assert merged["limit"] is None
    assert merged["max_steps"] == 3
    assert "learning_rate" not in merged


def test_a_secret_is_passed_on_but_not_written() -> None:
    parsed = parse(*REQUIRED, "--hub-token", "hf_secret")
    assert parsed.training == {"hub_token": "hf_secret"}
    assert "hub_token" not in merged_config(*parsed)


def test_a_configuration_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_config(path, {"a": 1})
    with pytest.raises(Exception, match="represent"):
        write_config(path, {"a": object()})
    assert read_config(path) == {"a": 1}


# Help

TOY_COMMON = (
    "  --learning-rate NUMBER\n      Initial learning rate. Default: 1e-06.\n",
    "  --max-steps INTEGER\n      Steps; -1 for whole epochs. Default: -1.\n",
    "  --tracker wandb|trackio|none\n      Where metrics go, beside the log. Default: none.\n",
)
"""The common training flags, read from the source for --help and from the class for --help-all."""


def test_help_shows_groups_defaults_and_types(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "promptkd toy: Do something with a model.\n\nUsage: promptkd toy --data PATH [PATH ...] --model TEXT"
    )
    assert "\nIt takes these two lines and fills them into one paragraph.\n" in text
    assert "\n    promptkd toy --model M --data D   # an example, as it stands\n" in text
    titles = ["\nRequired\n", "\nOptions\n", "\nTraining flags in common use\n", "\nWith every command\n"]
    assert sorted(titles, key=text.index) == titles
    assert "  --model TEXT\n      Folder or hub name of the model.\n" in text
    assert "  --data PATH [PATH ...]\n      Files of rows.\n" in text
    assert "  --max-prompt-length INTEGER\n      Longest prompt, in tokens. Default: 256.\n" in text
    assert "  --packing, --no-packing\n      Several rows in one. Default: true.\n" in text
    assert "  --direction forward|reverse\n      Which divergence. Default: reverse.\n" in text
    assert "  --limit INTEGER|none\n      How many rows, all by default. Default: none.\n" in text
    assert "  --seeds INTEGER [INTEGER ...]\n      Seeds. Default: 10 20.\n" in text
    for entry in TOY_COMMON:
        assert entry in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_all_shows_every_training_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "--help-all", "--wrong"]) == 0
    text = capsys.readouterr().out
    for entry in TOY_COMMON:
        assert entry in text
    assert "  --lr-scheduler-type linear|cosine\n" in text
    assert "  --bf16 true|false|none\n" in text
    assert "--computed" not in text
    assert text.count("  --debug\n") == 1  # the program's, not the training configuration's


def test_help_names_the_positional_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["loose", "-h"]) == 0
    text = capsys.readouterr().out
    assert "Usage: promptkd loose RUNS ... [flags]" in text
    assert "  RUNS ... (or --runs PATH [PATH ...])\n      Folders of runs.\n" in text


def test_help_imports_nothing_heavy(toy_folder: Path) -> None:
    heavy = {"torch", "transformers", "trl", "rich", "pydantic", "toy_training"}
    after = f"found = {heavy} & set(sys.modules); assert not found, found"
    for arguments in (["toy", "--help"], ["--help"]):
        done = subprocess_main(toy_folder, *arguments, after=after)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage: promptkd" in done.stdout


def test_options_of_the_command_alone_do_not_import_the_training_config(toy_folder: Path) -> None:
    done = subprocess_main(
        toy_folder, "toy", *REQUIRED, "--limit", "3", after="assert 'toy_training' not in sys.modules"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran M\n", "")


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, summary in cli.COMMANDS.items():
        assert [name, *summary.split()] in [line.split() for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= 100
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", text)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.split()[0] == "promptkd"


# Messages and exit statuses


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["toi"],
            2,
            "promptkd: There is no command 'toi'. Did you mean 'toy'? `promptkd --help` lists the commands.\n",
        ),
        (["zzz"], 2, "promptkd: There is no command 'zzz'. The commands are demo, prune,"),
        (["--model", "M"], 2, "promptkd: Expected a command first. Got --model."),
        (["toy", *REQUIRED, "--oot"], 2, "promptkd toy: --oot is unknown. Did you mean --out?"),
        (["toy", *REQUIRED, "--fail", "cross-check"], 2, "promptkd toy: Two options do not go together.\n"),
        (["toy", *REQUIRED, "--fail", "run"], 1, "promptkd toy: Expected a finite loss. Got nan at step 3."),
        (
            ["toy", *REQUIRED, "--fail", "bug"],
            1,
            "promptkd toy failed: ValueError: shapes differ: (1,) and (2,). Run again with --debug for the traceback.",
        ),
        (
            ["toy", *REQUIRED, "--fail", "socket"],
            1,
            "promptkd toy failed: BrokenPipeError: [Errno 32] the server hung up.",
        ),
        (["toy", *REQUIRED, "--fail", "interrupt"], 130, "promptkd toy: Interrupted.\n"),
    ],
)
def test_failures(arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == status
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert "Traceback" not in captured.err
    assert captured.out.strip() == ""


@pytest.mark.parametrize("place", [0, 1, 3, 7])
def test_debug_anywhere_shows_the_traceback(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["toy", *REQUIRED, "--fail", "bug"]
    arguments.insert(place, "--debug")
    assert cli.main(arguments) == 1
    text = capsys.readouterr().err
    assert text.startswith("Traceback (most recent call last)")
    assert text.endswith("promptkd toy failed: ValueError: shapes differ: (1,) and (2,).\n")


def test_exit_statuses_are_those_of_the_errors() -> None:
    assert (PromptKDError.exit_status, RequestError.exit_status) == (1, 2)


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([*REQUIRED, "--fail", "pipe"], 1)])
def test_a_reader_that_leaves_is_no_news(toy_folder: Path, arguments: list[str], status: int) -> None:
    before = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1)"  # standard output without a reader
    done = subprocess_main(toy_folder, "toy", *arguments, before=before)
    assert (done.returncode, done.stderr) == (status, "")


def test_environment_defaults_do_not_override_the_users(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    assert cli.main(["--help"]) == 0
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_python_dash_m_promptkd() -> None:
    done = subprocess.run([sys.executable, "-m", "promptkd"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("promptkd compresses generative language models")
