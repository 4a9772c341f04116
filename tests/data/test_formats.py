"""Columns to examples, with and without a chat template, up to the labels TRL makes of them."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from lopt.data.columns import FORMATS, infer_format
from lopt.data.formats import format_rows

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    """One token per byte, so every text survives it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, "<eos>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"eos_token": "<eos>", "pad_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


CHATTY, PLAIN = make_tokenizer(chat=True), make_tokenizer(chat=False)


def turn(role: str, content: str | None) -> dict[str, str | None]:
    return {"role": role, "content": content}


DIALOGUE = [
    turn("system", "Be kind."),
    turn("user", "Hi"),
    turn("assistant", "Hello"),
    turn("user", "Bye"),
    turn("assistant", "See you"),
    turn("user", "Still here?"),
]


def one(row: dict, chat: bool = False, **options: bool) -> dict:
    made = format_rows(Dataset.from_list([row]), CHATTY if chat else PLAIN, **options)
    assert len(made) == 1
    return made[0]


def test_precedence_of_columns():
    for position, fmt in enumerate(FORMATS):
        # Every later format's columns are there too, in an order that must not matter.
        columns = {name for later in FORMATS[position:] for name in later.columns}
        assert infer_format([*sorted(columns), "id"]) is fmt
    with pytest.raises(ValueError) as caught:
        infer_format(["instruction", "answer"])
    message = str(caught.value)
    assert "\n" not in message and "instruction, answer" in message
    assert all(fmt.name in message for fmt in FORMATS)


@pytest.mark.parametrize(
    ("row", "prompt", "completion", "user"),
    [
        ({"prompt": "p ", "completion": "c"}, "p ", "c", "p "),
        ({"prompt": "p", "response": "c"}, "p", "c", "p"),
        ({"query": "q", "response": "r"}, "Question: q\nAnswer:", " r", "q"),
        ({"question": "q", "answer": 2}, "Question: q\nAnswer:", " 2", "q"),
        ({"problem": "q", "solution": 2.5}, "Question: q\nAnswer:", " 2.5", "q"),
        ({"query": "q", "response": True}, "Question: q\nAnswer:", " true", "q"),
        (
            {"instruction": "do", "input": "", "output": "o", "text": "not this"},
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\ndo\n\n### Response:\n",
            "o",
            "do",
        ),
        (
            {"instruction": "do", "input": "x", "output": "o"},
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\ndo\n\n### Input:\nx\n\n### Response:\n",
            "o",
            "do\n\nx",
        ),
    ],
)
def test_pairs(row, prompt, completion, user):
    row = {**row, "id": 7}
    assert one(row) == {"prompt": prompt, "completion": completion}
    assert one(row, chat=True) == {
        "prompt": [turn("user", user)],
        "completion": [turn("assistant", completion.strip())],
    }


def test_messages():
    row = {"messages": DIALOGUE}
    assert one(row, chat=True) == {"prompt": DIALOGUE[:4], "completion": DIALOGUE[4:5]}
    assert one(row, chat=True, assistant_only=True) == {"messages": DIALOGUE[:5]}
    assert one(row) == {
        "prompt": "System: Be kind.\nUser: Hi\nAssistant: Hello\nUser: Bye\nAssistant:",
        "completion": " See you",
    }


def test_conversational_pairs_pass_through():
    row = {"prompt": DIALOGUE[:2], "completion": DIALOGUE[2:5]}
    assert one(row, chat=True) == row
    assert one(row) == {
        "prompt": "System: Be kind.\nUser: Hi\nAssistant:",
        "completion": " Hello\nUser: Bye\nAssistant: See you",
    }
    mixed = one({"prompt": DIALOGUE[:2], "response": "Hello"}, chat=True)
    assert mixed["completion"] == DIALOGUE[2:3]


def test_text_keeps_only_text():
    assert one({"text": "all of it", "id": 1}, chat=True) == {"text": "all of it"}


def test_rows_without_a_completion_are_dropped_with_a_warning(caplog):
    # More than one batch of `map`, the first of them left with no row at all.
    answers = [None, "", " "] * 400 + ["a"]
    rows = Dataset.from_list([{"question": "q", "answer": answer} for answer in answers])
    for tokenizer in (CHATTY, PLAIN):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="lopt"):
            assert len(format_rows(rows, tokenizer)) == 1
        assert "dropped 1200 of 1201 rows whose `answer` is empty" in caplog.text
        with pytest.raises(ValueError, match="no row left, `answer` is empty in all 5 rows"):
            format_rows(rows.select(range(5)), tokenizer)
    silent = {"messages": [turn("user", "Hi"), turn("assistant", None)]}
    with pytest.raises(ValueError, match="no row left"):
        one(silent)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "", "completion": "c"}, "`prompt`, is empty"),
        ({"question": None, "answer": "a"}, "`question`, must be text, not NoneType"),
        ({"question": 3, "answer": "a"}, "`question`, must be text, not int"),
        ({"question": "q", "answer": ["a"]}, "`answer`, must be text or a number, not list"),
        ({"messages": []}, "`messages`, must be a non-empty list"),
        ({"messages": "Hi"}, "`messages`, must be a non-empty list"),
        ({"messages": [{"content": "Hi"}]}, "without a role"),
        ({"messages": [turn("user", "Hi")]}, "no assistant message (roles: user)"),
        ({"messages": [turn("assistant", "Hi")]}, "no message before"),
        ({"messages": [turn("user", " "), turn("assistant", "Hi")]}, "empty user message"),
        ({"messages": [turn("user", None), turn("assistant", "Hi")]}, "content is not text"),
        ({"prompt": "p", "completion": [turn("user", "Hi")]}, "must begin with an assistant"),
    ],
)
def test_a_bad_row_is_named_with_its_column(row, expected):
    with pytest.raises(ValueError) as caught:
        one(row, chat=True)
    message = str(caught.value)
    assert "row 0" in message and expected in message and "\n" not in message


def test_the_row_number_counts_from_the_start_of_the_data():
    rows = Dataset.from_list([{"prompt": "p", "completion": "c"}] * 1500 + [{"prompt": ""}])
    with pytest.raises(ValueError, match="row 1500 "):
        format_rows(rows, PLAIN)


def test_a_stream_gives_the_same_examples(caplog):
    answers = [None, "", " "] * 400 + ["a", "2"]
    sums = Dataset.from_list([{"question": "q", "answer": answer, "id": 1} for answer in answers])
    alpaca = Dataset.from_list([{"instruction": "do", "input": "x", "output": "o"}] * 3)
    for rows in (sums, alpaca, Dataset.from_list([{"messages": DIALOGUE}])):
        for tokenizer in (CHATTY, PLAIN):
            stream = format_rows(rows.to_iterable_dataset(), tokenizer)
            assert list(stream) == list(format_rows(rows, tokenizer))
            assert stream.column_names == ["prompt", "completion"]
    said = [record.message for record in caplog.records if "rows of the stream" in record.message]
    assert said == ["rows of the stream: left out, their `answer` has nothing to train on"] * 2
    empty = Dataset.from_list([{"question": "q", "answer": ""}] * 3).to_iterable_dataset()
    with pytest.raises(ValueError, match="`answer` is empty in every row of the stream"):
        format_rows(empty, PLAIN)


def test_a_bad_row_of_a_stream_is_named_with_its_start():
    rows = Dataset.from_list(
        [{"prompt": "p", "completion": "c"}] * 3 + [{"prompt": "", "completion": "lost"}]
    )
    with pytest.raises(ValueError, match=r"row 3 \(from 0\).* it starts with .*'completion': 'lost'"):
        format_rows(rows.to_iterable_dataset(), PLAIN)


def test_assistant_only_needs_turns():
    for tokenizer, row in [(PLAIN, {"messages": DIALOGUE}), (CHATTY, {"text": "x"})]:
        with pytest.raises(ValueError, match="`assistant_only_loss`"):
            format_rows(Dataset.from_list([row]), tokenizer, assistant_only=True)


text = st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip)


@settings(max_examples=25, deadline=None)
@given(question=text, answer=text)
def test_any_text_comes_back_from_an_example(question, answer):
    row = {"question": question, "answer": answer}
    plain, chat = one(row), one(row, chat=True)
    assert plain["prompt"][len("Question: ") : -len("\nAnswer:")] == question
    assert plain["completion"][1:] == answer
    assert [chat["prompt"][0]["content"], chat["completion"][0]["content"]] == [question, answer]


@pytest.mark.parametrize(
    ("row", "chat", "assistant_only", "learned"),
    [
        ({"question": "q", "answer": "an answer"}, False, False, " an answer<eos>"),
        ({"question": "q", "answer": "an answer"}, True, False, "an answer<eos>"),
        ({"messages": DIALOGUE}, False, False, " See you<eos>"),
        ({"messages": DIALOGUE}, True, False, "See you<eos>"),
        ({"messages": DIALOGUE}, True, True, "Hello<eos>See you<eos>"),
        ({"text": "all"}, True, False, "all<eos>"),
    ],
)
def test_trl_learns_the_completion_and_nothing_else(row, chat, assistant_only, learned, tmp_path):
    tokenizer = CHATTY if chat else PLAIN
    made = format_rows(Dataset.from_list([row] * 2), tokenizer, assistant_only=assistant_only)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=256)
    arguments = SFTConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, assistant_only_loss=assistant_only
    )
    model = GPT2LMHeadModel(config)
    trainer = SFTTrainer(model, arguments, train_dataset=made, processing_class=tokenizer)
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0].tolist()
    assert tokenizer.decode([label for label in labels if label != -100]) == learned


def test_real_data(shared_data, tmp_path):
    for name, column in (("gsm8k", "answer"), ("alpaca", "output")):
        path = str(shared_data / name / "train.jsonl")
        rows = load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path))
        made = format_rows(rows, PLAIN)
        assert made.column_names == ["prompt", "completion"]
        assert made[0]["prompt"].endswith("\nAnswer:" if name == "gsm8k" else "### Response:\n")
        empty = sum(not answer.strip() for answer in rows[column])
        assert len(made) == len(rows) - empty
