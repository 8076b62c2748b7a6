"""Answers in the terminal: those of `generate`, side by side or one after another, and never obeyed by the terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from rich.console import Console

from helpers.commands import hear_interrupts, json_lines, run, write_rows
from helpers.tiny import END_ID, POSITIONS, save_model, tiny_model, tiny_tokenizer
from promptkd.cli.commands.chat import Writing, _Session, write_in_turn, write_side_by_side
from promptkd.errors import RequestError
from promptkd.generation import Decoding, SamplingParams, generate, row_seeds
from promptkd.generation.conversation import Conversation, StreamedAnswer
from promptkd.visible import shown

LENGTH = 12
GREEDY = Decoding(temperature=0, max_new_tokens=LENGTH)
SHORT = ("--max-completion-length", LENGTH)
HOSTILE = "\x1b[2Jgone\x1b]0;title\x07 \x9b31m \u202edesrever\u2028[bold]text[/bold] \r\x08\x7f"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "other", "teacher")):
        save_model(folder / name, tiny_model("llama", seed=seed, tied=False), tiny_tokenizer(chat=name != "other"))
    return folder


def typed(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def blocks(out: str) -> list[tuple[str, str]]:
    """Label and text of every answer."""
    parts = re.split(r"^== (.*) ==\n", out, flags=re.MULTILINE)[1:]
    return [(label, text.removesuffix("\n\n")) for label, text in zip(parts[::2], parts[1::2], strict=True)]


def chat(capsys, *arguments):
    ran = run(capsys, "chat", *arguments, *SHORT)
    assert ran.status == 0, ran.err
    return blocks(ran.out)


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [("--temperature", 0), ("--temperature", 1.2, "--top-p", 0.9, "--seed", 4)])
def test_every_model_answers_as_generate_writes(models, tmp_path, capsys, decoding):
    request = write_rows(tmp_path / "data.jsonl", [{"instruction": "the man"}])
    expected = []
    for name in ("student", "other", "teacher"):
        out = tmp_path / f"{name}.jsonl"
        given = ("--model", models / name, "--data", request, "--out", out, *SHORT, *decoding)
        assert run(capsys, "generate", *given).status == 0
        expected.append(shown(json_lines(out)[0]["completion"]))
    given = (models / "student", models / "other", "--teacher", models / "teacher", "--prompt", "the man")
    found = chat(capsys, *given, *decoding)
    assert [label for label, _ in found] == ["student", "other", "teacher: teacher"]
    assert [text for _, text in found] == expected
    assert len(set(expected)) == 3


@pytest.mark.slow
def test_lines_of_standard_input_are_requests(models, capsys, monkeypatch):
    typed(monkeypatch, "the\n\nan\n /help\n")
    found = chat(capsys, models / "other")
    assert len(found) == 3  # a blank line asks nothing, a space makes a request of a command
    for request, answer in zip(("the", "an", "/help"), found, strict=True):
        assert chat(capsys, models / "other", "--prompt", request) == [answer]


@pytest.mark.slow
def test_a_seed_gives_the_same_answers_again(models, capsys, monkeypatch):
    sampled = (models / "other", "--temperature", 1)
    typed(monkeypatch, "the\nthe\n/reset\nthe\nthe\n/seed 11\nthe\n/reset\nthe\n")
    first, second, again, second_again, _, other = chat(capsys, *sampled, "--seed", 10)
    assert (first, second) == (again, second_again)
    assert first != second
    assert other != first
    assert chat(capsys, *sampled, "--seed", 11, "--prompt", "the") == [other]
    typed(monkeypatch, "/temperature 0\nthe\n")
    assert chat(capsys, *sampled) == chat(capsys, models / "other", "--prompt", "the")


@pytest.mark.slow
def test_a_chat_template_makes_a_conversation_of_it(models, capsys, monkeypatch):
    typed(monkeypatch, "the\nan\n/reset\nan\n")
    first, second, alone = chat(capsys, models / "student")
    assert second != alone
    model, tokenizer = tiny_model("llama", tied=False), tiny_tokenizer(chat=True)
    params = SamplingParams(max_new_tokens=LENGTH, stop_ids=[END_ID], temperature=0)
    history = tokenizer("<|user|>the<|assistant|>", add_special_tokens=False)["input_ids"]
    (answer,) = generate(model, [history], params)
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert first == ("student", shown(text))
    history += tokenizer(text, add_special_tokens=False)["input_ids"] + [END_ID]
    history += tokenizer("<|user|>an<|assistant|>", add_special_tokens=False)["input_ids"]
    (answer,) = generate(model, [history], params)
    assert second == ("student", shown(tokenizer.decode(answer, skip_special_tokens=True)))


def test_without_a_chat_template_requests_stand_alone(models, capsys, monkeypatch):
    typed(monkeypatch, "the\nan\nthe\n")
    first, _, third = chat(capsys, models / "other")
    assert first == third
    talk = conversation(template="alpaca")
    before = talk._prompt("the")
    "".join(talk.ask("an", GREEDY)[1])
    assert (talk.messages, talk._prompt("the"), talk.remembers) == ([], before, False)


def conversation(**settings):
    return Conversation(tiny_model("llama", tied=False), tiny_tokenizer(chat=True), **settings)


def test_what_was_said_when_an_answer_is_stopped_is_remembered():
    talk = conversation()
    answer, pieces = talk.ask("the", GREEDY)
    said = next(pieces) + next(pieces)
    pieces.close()
    assert (answer.text, answer.tokens, answer.ended) == (said, 2, False)
    assert talk.messages == [{"role": "user", "content": "the"}, {"role": "assistant", "content": said}]
    talk.reset()
    assert talk.messages == []


def test_an_answer_stays_within_the_models_context():
    talk = conversation()
    long = "a" * (POSITIONS - 6)
    answer, pieces = talk.ask(long, GREEDY)
    assert answer.limit == 4  # two tokens of the template
    "".join(pieces)
    with pytest.raises(
        RequestError, match=f"what was said before included, .* {POSITIONS} at most. Start from scratch"
    ):
        talk.ask("the", GREEDY)
    assert tiny_model("gpt2").config.to_dict().get("max_position_embeddings") is None  # it has another name for it
    assert Conversation(tiny_model("gpt2"), tiny_tokenizer()).context == POSITIONS


def test_a_control_token_that_is_typed_is_text():
    talk = conversation()
    answer, pieces = talk.ask("the<|end|>", GREEDY)
    "".join(pieces)
    spelled = talk.tokenizer("<|user|>the", add_special_tokens=False)["input_ids"]
    spelled += talk.tokenizer("<|end|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    spelled += talk.tokenizer("<|assistant|>", add_special_tokens=False)["input_ids"]
    (expected,) = generate(
        talk.model, [spelled], SamplingParams(max_new_tokens=LENGTH, stop_ids=[END_ID], temperature=0)
    )
    assert answer.text == talk.tokenizer.decode(expected, skip_special_tokens=True)


def test_later_turns_are_drawn_as_later_rows():
    talk = conversation(template="alpaca")
    _, pieces = talk.ask("the", Decoding(max_new_tokens=LENGTH, temperature=1.0, seed=3), turn=2)
    text = "".join(pieces)
    (prompt,) = [talk._prompt("the")]
    params = SamplingParams(max_new_tokens=LENGTH, stop_ids=[END_ID])
    (expected,) = generate(talk.model, [prompt], params, seeds=row_seeds(3, 3)[2:])
    assert text == talk.tokenizer.decode(expected, skip_special_tokens=True)


# --------------------------------------------------------------------------------------------------------------- view


def writing(pieces, *, label="model", ended=True):
    answer = StreamedAnswer(limit=9)

    def fill():
        for piece in pieces:
            if isinstance(piece, type):
                raise piece
            answer.tokens, answer.text = answer.tokens + 1, answer.text + piece
            yield piece
        answer.ended = ended

    return Writing(label, answer, fill())


def screen(writings, *, width=80, height=24):
    """What is written to a terminal, as it goes out and without the view's own colors and cursor movements."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=height, legacy_windows=False, highlight=False)
    write_side_by_side(console, writings)
    raw = file.getvalue()
    return raw, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw)


def test_columns_stand_side_by_side():
    _, text = screen([writing(["one "] * 30, label="first"), writing(["two "] * 9, label="second")])
    final = text[text.rindex("╭─ first") :].splitlines()
    assert re.fullmatch(r"╭─ first ─+╮╭─ second ─+╮", final[0])
    assert re.match(r"│ one one .*││ two two ", final[1])
    assert all(len(line) == 80 for line in final)
    assert "30 tokens" in text
    assert "9 tokens" in text


def test_narrow_terminals_get_fewer_columns():
    names = ["first", "second", "third"]
    for width, across in ((40, 1), (80, 2), (160, 3)):
        _, text = screen([writing(["word "] * 5, label=name) for name in names], width=width)
        final = text[text.rindex("╭─ first") :].splitlines()
        assert final[0].count("╭─") == across
        assert all(name in text for name in names)


def test_a_long_answer_scrolls_and_is_shown_whole_at_the_end():
    words = [f"w{index} " for index in range(400)]
    raw, text = screen([writing(words), writing(words, label="other")], height=12)
    assert {word.strip() for word in words} <= set(text[text.rindex("╭─ model") :].split())
    frames = raw.split("╭─")[1:-2]
    assert frames
    assert max(frame.count("\n") for frame in frames) < 12


def test_a_word_that_is_wider_than_its_column_is_folded():
    word = "".join(chr(ord("a") + index % 26) for index in range(100))
    _, text = screen([writing([word]), writing(["b"])])
    final = text[text.rindex("╭─ model") :]
    assert "".join(line[2:38].rstrip() for line in final.splitlines()[1:-1]) == word


def test_a_stopped_answer_stops_all_and_keeps_what_there_is():
    first, second = writing(["one", "two", KeyboardInterrupt, "three"]), writing(["uno", "dos", "tres"])
    _, text = screen([first, second])
    assert (first.answer.text, second.answer.text) == ("onetwo", "unodos")
    assert text.count("stopped") == 2


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_request_that_is_stopped_is_read_by_every_model_later(is_terminal, monkeypatch):
    talks = {"first": conversation(), "second": conversation()}
    session = _Session(talks, GREEDY, Console(file=io.StringIO(), force_terminal=is_terminal))
    monkeypatch.setattr(Writing, "advance", interrupted := Interrupted(Writing.advance))
    with suppress(KeyboardInterrupt):
        session.ask("the")
    assert interrupted.calls == 1
    said = [talk.messages for talk in talks.values()]
    assert [each[0] for each in said] == [{"role": "user", "content": "the"}] * 2
    assert [each[1]["content"] for each in said] == [said[0][1]["content"], ""]


class Interrupted:
    """Ctrl-C after the first piece of the first answer."""

    def __init__(self, advance):
        self.advance, self.calls = advance, 0

    def __get__(self, writing, kind):
        def advance():
            self.calls += 1
            self.advance(writing)
            raise KeyboardInterrupt

        return advance


def test_why_an_answer_ended():
    _, text = screen([writing(["a"], ended=False), writing(["b"])])
    assert "1 token, cut at 9" in text
    assert "1 token ─" in text


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_no_terminal_obeys_a_model(cut):
    """However its output is cut into pieces, and whatever the models are called."""
    pieces = [HOSTILE[first : first + cut] for first in range(0, len(HOSTILE), cut)]
    raw, text = screen([writing(pieces, label="\x1b[2Jevil"), writing(pieces)])
    file = io.StringIO()
    write_in_turn(Console(file=file, width=80), [writing(pieces, label="\x1b]0;evil")])
    for out in (raw, file.getvalue()):
        assert not set(out) & set("\x07\x08\x7f\x9b\u202e\u2028")
        assert "\x1b[2J" not in out
        assert "\x1b]" not in out
        assert not re.search(r"\r(?!\x1b\[)", out)  # but for the view's own, before it clears a line
    assert "␛[2Jgone␛]0;title␇" in text
    assert "[bold]text[/bold]" in text.replace("\n", "")
    assert "\x1b" not in file.getvalue()


# ------------------------------------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "MODELS is missing"),
        (("student", "student"), "student is given more than once"),
        (("student", "--teacher", "student"), "student is given more than once"),
        (("nowhere", "--prompt", "x"), "nowhere"),
        (("student", "--prompt", " "), "--prompt is empty"),
        (("student", "--temperature", "-1", "--top-p", "0", "--seed", "-2"), "--temperature must be 0"),
        (("student", "--max-completion-length", "0"), "--max-completion-length must lie in [1, 1000000]. Got 0"),
        (("student", "--template", "nonsense", "--prompt", "x"), "nonsense"),
        (("other", "--template", "chat", "--prompt", "x"), "has no chat template"),
        (("student", "--prompt", "a" * POSITIONS), "student: The prompt has 514 tokens"),
        (("student", "--prompt", "\udc80"), "is not valid UTF-8"),
    ],
)
def test_a_wrong_request(models, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(models)
    ran = run(capsys, "chat", *flags)
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err


def test_standard_input_that_is_no_utf8(models, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"th\xe9\n"), encoding="utf-8"))
    ran = run(capsys, "chat", models / "other")
    assert (ran.status, ran.out) == (2, "")
    assert "standard input" in ran.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nonsense", "/nonsense is no command"),
        ("/seed", "/seed expects a number. Got nothing"),
        ("/seed 1.5", "Got 1.5"),
        ("/temperature warm", "Got warm"),
        ("/temperature -1", "temperature must be 0"),
        ("/temperature nan", "Got nan"),
        ("/temperature 1e999", "Got 1e999"),
        (f"/seed {10**30}", "Got 1000000"),
    ],
)
def test_a_wrong_command_ends_a_script(models, capsys, monkeypatch, line, message):
    typed(monkeypatch, f"{line}\nthe\n")
    ran = run(capsys, "chat", models / "other")
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err


# ----------------------------------------------------------------------------------------------------------- terminal


class Terminal:
    """`promptkd chat` on a terminal of its own."""

    def __init__(self, *arguments):
        ours, theirs = pty.openpty()
        own = {"COLUMNS": "80", "LINES": "24", "TERM": "xterm", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "promptkd", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | own,
            start_new_session=True,
            preexec_fn=hear_interrupts,
        )
        os.close(theirs)
        self.end, self.seen = ours, ""

    def expect(self, text: str, seconds: float = 30) -> str:
        """What came before `text`, which must come; colors are left out."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.end], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                pytest.fail(f"{text!r} did not come, but {self.seen[-500:]!r}")
            self.seen += re.sub(r"\x1b\[[0-9;]*m", "", os.read(self.end, 65536).decode(errors="replace"))
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@pytest.mark.slow
def test_a_conversation_on_a_terminal(tmp_path):
    for seed, name in enumerate(("student", "other")):  # whose answers outlast the interrupt on the fastest machine
        endless = tiny_model("llama", seed=seed, tied=False, max_position_embeddings=100_000)
        save_model(tmp_path / name, endless, tiny_tokenizer(chat=name != "other"))
    terminal = Terminal(tmp_path / "student", tmp_path / "other", "--max-completion-length", 90_000)
    try:
        assert "Each request stands alone for other" in terminal.expect("> ")
        terminal.type("the man\n")
        assert "╭─ student ─" in terminal.expect("─╮╭─ other ─")
        terminal.expect("/s ")
        terminal.interrupt()
        terminal.expect("stopped")
        terminal.expect("> ")
        time.sleep(0.5)  # until the prompt, which is on the screen, waits for input
        terminal.interrupt()  # here it only begins a new line
        terminal.expect("> ")
        terminal.type("/nonsense\n")
        terminal.expect("/nonsense is no command")
        terminal.expect("> ")
        terminal.type("\x1b[A\x1b[A\n")  # the request before, from the history
        assert "the man" in terminal.expect("╭─ student")
        terminal.interrupt()
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)


def test_tokens_beyond_the_embedding_are_refused_before_the_model_reads_them():
    short = tiny_model("llama", vocabulary=80, pad_token_id=0)
    with pytest.raises(RequestError, match=r"Answers end with the token id \d+.*resize_token_embeddings"):
        Conversation(tokenizer=tiny_tokenizer(), model=short)
    short.generation_config.eos_token_id = 1
    conversation = Conversation(tokenizer=tiny_tokenizer(), model=short)
    with pytest.raises(RequestError, match=r"The prompt has the token id \d+.*resize_token_embeddings"):
        conversation.ask("the", GREEDY)
