"""The tokens that student and teacher share; those of one side are masked, and rows that use them refused."""

import json

import pytest
import torch
from tokenizers import normalizers

from helpers.tiny import END_ID, VOCABULARY, tiny_model, tiny_tokenizer, token_id
from promptkd.data.encode import EncodedExample
from promptkd.engine import Vocabulary, head_logits
from promptkd.errors import RequestError
from promptkd.generation import SamplingParams, generate
from promptkd.generation.decode_loop import stream
from promptkd.models import shared_vocabulary, shared_vocabulary_size, vocabulary_size
from promptkd.models.vocabulary import vocabulary_without

SPARE = token_id("<spare1>")


def test_every_variant_of_one_tokenizer_is_the_same_vocabulary():
    for variant in ({}, {"bos": True}, {"pad": "own"}, {"eos": False}, {"chat": True}):
        for pair in ((tiny_tokenizer(**variant), tiny_tokenizer()), (tiny_tokenizer(), tiny_tokenizer(**variant))):
            shared = shared_vocabulary(*pair)
            assert (shared.size, shared.masked, shared.notes) == (VOCABULARY, (), [])


def altered(change):
    """The tiny tokenizer with its serialized form changed."""
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state)
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    return tokenizer


def test_an_id_with_another_meaning_is_refused():
    def swap(state):
        vocabulary = state["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    a, b = token_id("a"), token_id("b")
    for student, teacher, ids in ((altered(swap), tiny_tokenizer(), (b, a)), (tiny_tokenizer(), altered(swap), (a, b))):
        message = rf"2 tokens differ, 'a' among them: id {ids[0]} in the student, {ids[1]} in the teacher"
        with pytest.raises(RequestError, match=message):
            shared_vocabulary(student, teacher)


def test_one_vocabulary_with_another_normalizer_is_refused():
    lower = tiny_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert lower.get_vocab() == tiny_tokenizer().get_vocab()
    with pytest.raises(RequestError, match="share 97 tokens but split text differently"):
        shared_vocabulary(lower, tiny_tokenizer())


@pytest.mark.parametrize(
    "merges",
    [
        (("t", "h"), ("th", "e")),
        (("a", "n"),),
    ],
)
def test_one_vocabulary_with_other_merges_is_refused(merges):
    other = tiny_tokenizer(merges=merges)
    assert other.get_vocab() == tiny_tokenizer().get_vocab()
    with pytest.raises(RequestError, match="share 97 tokens but split text differently"):
        shared_vocabulary(other, tiny_tokenizer())


def test_the_padding_of_heads_is_sliced_off():
    student, teacher = tiny_model("llama", vocabulary=VOCABULARY + 7), tiny_model("llama", vocabulary=VOCABULARY + 31)
    exact = tiny_model("gpt2")
    for pair in ((student, teacher), (teacher, student), (student, student), (exact, teacher), (exact, exact)):
        assert shared_vocabulary_size(*pair, tiny_tokenizer()) == VOCABULARY


def test_ids_may_have_gaps():
    """A tokenizer of 98 tokens whose highest id is 120 needs 121 columns."""

    def far(state):
        state["model"]["vocab"]["far"] = 120

    gapped = altered(far)
    assert len(gapped.get_vocab()) == VOCABULARY + 1
    assert vocabulary_size(gapped) == 121
    assert vocabulary_size(tiny_tokenizer()) == VOCABULARY
    model, wide = tiny_model("gpt2", vocabulary=VOCABULARY + 1), tiny_model("gpt2", vocabulary=130)
    with pytest.raises(RequestError, match=r"student's head .* 121 tokens\. Got 98"):
        shared_vocabulary_size(model, wide, gapped)
    assert shared_vocabulary_size(wide, wide, gapped) == 121


def test_a_head_smaller_than_the_tokenizer_is_refused():
    small, right = tiny_model("llama", vocabulary=VOCABULARY - 1, eos_token_id=1, pad_token_id=1), tiny_model("llama")
    with pytest.raises(RequestError, match=r"The student's head must have a column .* 97 tokens. Got 96"):
        shared_vocabulary_size(small, right, tiny_tokenizer())
    with pytest.raises(RequestError, match=r"The teacher's head .* Got 96"):
        shared_vocabulary_size(right, small, tiny_tokenizer())


# ---- tokens of one side ----


def extended(*tokens, special=False):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    return tokenizer


def renamed(old="<spare1>", new="<reserved>"):
    def rename(state):
        state["model"]["vocab"][new] = state["model"]["vocab"].pop(old)

    return altered(rename)


@pytest.mark.parametrize("special", [False, True])
def test_an_added_token_is_masked_and_named(special):
    plain, more = tiny_tokenizer(), extended("<more>", "<and>", special=special)
    shared = shared_vocabulary(plain, more)
    assert (shared.size, shared.masked) == (VOCABULARY, (97, 98))
    (note,) = shared.notes
    assert note == (
        "Student and teacher share 97 tokens; 2 ids are left out of both distributions and never sampled: "
        "'<more>' (97), '<and>' (98) of the teacher."
    )
    (note,) = shared_vocabulary(more, plain).notes
    assert note.endswith("'<more>' (97), '<and>' (98) of the student.")


def test_a_renamed_token_is_masked_under_both_names():
    shared = shared_vocabulary(tiny_tokenizer(), renamed())
    assert (shared.size, shared.masked) == (VOCABULARY, (SPARE,))
    (note,) = shared.notes
    assert "1 id is left out" in note
    assert f"'<spare1>' ({SPARE}) of the student, '<reserved>' ({SPARE}) of the teacher." in note


def test_many_tokens_are_counted():
    (note,) = shared_vocabulary(tiny_tokenizer(), extended(*(f"<more{index}>" for index in range(30)))).notes
    assert "30 ids are left out" in note
    assert note.endswith("'<more3>' (100) and 26 more of the teacher.")


def test_placeholders_for_no_token_are_masked():
    """Some converters name the unused rows of an embedding among the ordinary tokens."""

    def pad(state):
        state["model"]["vocab"] |= {f"[PAD{index}]": index for index in range(VOCABULARY, VOCABULARY + 9)}

    shared = shared_vocabulary(tiny_tokenizer(), altered(pad))
    assert (shared.size, len(shared.masked)) == (VOCABULARY, 9)


def test_ordinary_tokens_of_one_side_are_refused():
    def merge(state):
        state["model"]["vocab"]["ou"] = VOCABULARY
        state["model"]["merges"].append(["o", "u"])

    for pair in ((tiny_tokenizer(), altered(merge)), (altered(merge), tiny_tokenizer())):
        with pytest.raises(RequestError, match="share 97 tokens but split text differently"):
            shared_vocabulary(*pair)


def test_one_added_token_under_two_ids_is_refused():
    with pytest.raises(
        RequestError, match="2 tokens differ, '<a>' among them: id 97 in the student, 98 in the teacher"
    ):
        shared_vocabulary(extended("<a>", "<b>"), extended("<b>", "<a>"))


def test_vocabularies_without_a_common_token_are_refused():
    def other(state):
        state["model"]["vocab"] = {f"x{token}": index for token, index in state["model"]["vocab"].items()}
        state["model"]["merges"], state["added_tokens"] = [], []
        state["model"]["unk_token"] = None

    with pytest.raises(RequestError, match=r"(share no token|split text differently|tokens differ).*promptkd sft"):
        shared_vocabulary(tiny_tokenizer(), altered(other))


def row(prompt_ids, response_ids, prompt="?", reference="abc"):
    return EncodedExample(prompt_ids, response_ids, (reference,), prompt, 7)


def test_rows_that_use_a_token_of_one_side_are_refused():
    shared = shared_vocabulary(renamed(), tiny_tokenizer())
    shared.check([row([5, 6], [7, END_ID])], "training rows")
    message = (
        rf"Row 7 of the training rows: the {{}} uses '<reserved>' \(id {SPARE}\), which is '<spare1>' in the teacher"
    )
    for part, used in (("prompt", row([5, SPARE], [7])), ("response", row([5], [7, SPARE]))):
        with pytest.raises(RequestError, match=message.format(part)) as refused:
            shared.check([row([5], [6]), used], "training rows")
        assert "`promptkd generate` by the teacher and `promptkd sft` on what it writes" in str(refused.value)
    with pytest.raises(RequestError, match="Every response ends with '<reserved>'"):
        shared.check_end(SPARE)
    shared.check_end(END_ID)
    shared.check_end(None)


def test_text_that_the_teacher_alone_reads_as_one_token_is_refused():
    shared = shared_vocabulary(tiny_tokenizer(), extended("<more>"))
    shared.check([row([5], [6], "less", "lesser")], "training rows")
    for part, used in (("prompt", row([5], [6], "so <more>")), ("response", row([5], [6], "?", "a <more> b"))):
        with pytest.raises(RequestError, match=f"the {part} holds '<more>', which only the teacher reads as one token"):
            shared.check([used], "training rows")
    shared_vocabulary(extended("<more>"), tiny_tokenizer()).check([row([5], [6], "so <more>")], "training rows")


def test_a_vocabulary_without_some_ids_is_only_as_long_as_needed():
    assert vocabulary_without(tiny_tokenizer(), ()) == Vocabulary(VOCABULARY)
    assert vocabulary_without(tiny_tokenizer(), (3, 95, 96, 120)) == Vocabulary(95, (3, 95, 96, 120))


# ---- masked tokens in logits and in what is written ----


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])  # plain, a soft cap, a scale
def test_a_masked_token_has_no_probability_and_the_others_theirs_among_themselves(architecture):
    model, hidden = tiny_model(architecture), torch.randn(5, 16)
    kept = [index for index in range(90) if index not in (3, 40)]
    plain = head_logits(model, hidden, vocabulary=90)
    masked = head_logits(model, hidden, vocabulary=Vocabulary(90, (3, 40, 95)))
    assert masked.shape == (5, 90)
    assert torch.equal(masked[:, kept], plain[:, kept])
    assert masked.softmax(-1)[:, [3, 40]].count_nonzero() == 0
    assert torch.equal(head_logits(model, hidden, vocabulary=Vocabulary(90)), plain)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_masked_token_is_never_written(temperature, mixed):
    model, other = tiny_model(layers=1, seed=1), tiny_model(layers=1, seed=2)
    prompts, seeds = [[5, 6, 7], [8], [9, 10]], [1, 2, 3]
    mixture = {"mixed_with": (other, 0.5)} if mixed else {}
    masked: tuple[int, ...] = ()
    for _ in range(3):  # what is written first becomes what must not be
        params = SamplingParams(temperature=temperature, max_new_tokens=12, vocabulary=VOCABULARY, masked_ids=masked)
        written = {token for each in generate(model, prompts, params, seeds=seeds, **mixture) for token in each}
        assert not written & set(masked)
        masked = (*masked, *written, VOCABULARY + 3)
    if not mixed:
        assert not set(stream(model, prompts[0], params, seed=1)) & set(params.masked_ids)
