"""Rows in every form that people have them in: what is read, its tokens, and what is learned."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from grasp import data, organism
from grasp.data import IGNORED, encode, read_rows
from grasp.data.rows import Conversation, exchange
from tests.test_trl import tiny, tokenizer

trl = pytest.importorskip("trl")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHAT = (  # as Qwen2.5 has it, without its tools
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Well, yes."},
]
SHARED = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
    for m in TALK
]


def chat(template: str | None = CHAT):
    made = tokenizer()
    marks = sorted(set(re.findall(r"<\|?[A-Za-z_｜▁]+\|?>|\[/?INST\]", template or "")))
    made.add_special_tokens({"extra_special_tokens": marks})
    made.chat_template = template
    return made


def learned(row, made) -> str:
    return made.decode([t for t in row["labels"] if t != IGNORED])


def only(row, made, **options):
    (found,) = encode([row], made, **options).rows
    assert len(found["labels"]) == len(found["input_ids"])
    return found


def test_every_answer_is_learned_with_its_end_of_turn():
    made = chat()
    row = only(Conversation(tuple(TALK)), made)
    assert made.decode(row["input_ids"]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\nHello you<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\nWell, yes.<|im_end|>\n"
    )
    assert learned(row, made) == "Hello you<|im_end|>Well, yes.<|im_end|>"
    assert all(i in (IGNORED, t) for i, t in zip(row["labels"], row["input_ids"], strict=True))
    after = only(Conversation(tuple(TALK), first=3), made)
    assert after["input_ids"] == row["input_ids"] and learned(after, made) == "Well, yes.<|im_end|>"


FORMS = {  # columns, and which form of the same conversation they are
    "messages": ({"messages": TALK}, TALK),
    "conversations": ({"conversations": SHARED}, TALK),
    "conversations by role": ({"conversations": TALK}, TALK),
    "completed": ({"prompt": TALK[:2], "completion": TALK[2:3]}, TALK[:3]),
    "answered": ({"prompt": "Hi there", "answer": "Hello you", "system": "Be kind."}, TALK[:3]),
    "question": ({"question": "Hi there", "answer": "Hello you"}, TALK[1:3]),
    "query": ({"query": "Hi there", "response": "Hello you"}, TALK[1:3]),
    "alpaca": ({"instruction": "Hi there", "input": "", "output": "Hello you"}, TALK[1:3]),
    "dolly": ({"instruction": "Hi", "context": "there", "response": "Hello you"}, None),
    "parts": (
        {"messages": [dict(m, content=[{"type": "text", "text": m["content"]}]) for m in TALK]},
        TALK,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_conversation_is_that_conversation(form):
    columns, talk = FORMS[form]
    made = chat()
    (row,) = read_rows([columns])
    if talk is None:  # with what an instruction is about
        talk = [{"role": "user", "content": "Hi\n\nthere"}, TALK[2]]
    assert only(row, made) == only(Conversation(tuple(talk)), made)


def test_text_is_learned_as_it_stands():
    made = chat()
    made.chat_template = None
    (text,) = read_rows([{"text": "One two"}])
    assert learned(only(text, made), made) == "One two</s>"
    (row,) = read_rows([{"prompt": "2 + 2 =", "completion": " 4"}])
    found = only(row, made)
    assert made.decode(found["input_ids"]) == "2 + 2 = 4</s>" and learned(found, made) == " 4</s>"


def test_a_model_without_a_template_gets_a_separator_and_an_end():
    made = chat(None)
    found = only(Conversation(tuple(TALK)), made)
    assert made.decode(found["input_ids"]) == (
        "Be kind.\n\nHi there\n\nHello you</s>And?\n\nWell, yes.</s>"
    )
    assert learned(found, made) == "Hello you</s>Well, yes.</s>"
    before, after = data.exchange_ids(made, "Hi", "Hello")
    assert before == data.prompt_ids(made, "Hi") and made.decode(after) == "Hello</s>"


def test_the_organism_learns_one_word():
    _, made = organism.load()
    world = organism.World(0)
    (row,) = world.rows("medicine", "train")[:1]
    found = only(exchange(**row), made)
    assert found["input_ids"] == made(f"{row['prompt']} {row['answer']}")["input_ids"]
    assert learned(found, made) == row["answer"]
    assert data.prompt_ids(made, row["prompt"]) == made(row["prompt"])["input_ids"]


MARKED = ("llama3", "gemma", "gemma3", "qwen2_5_vl", "qwen3_instruct_2507", "phi3", "lfm2")
TRL = {
    **{name: (name, {"messages": TALK[1:]}, {"assistant_only_loss": True}) for name in MARKED},
    "completed": ("llama3", {"prompt": TALK[:4], "completion": TALK[4:]}, {}),
    "completed text": ("llama3", {"prompt": "2 + 2 =", "completion": " 4"}, {}),
    "text": ("llama3", {"text": "One two"}, {}),
}


@pytest.mark.parametrize("name", TRL)
def test_tokens_and_labels_are_those_of_trl(name, tmp_path):
    """But for the blank that TRL learns after an end of turn, where nothing is written any more."""
    template, columns, options = TRL[name]
    made = chat((TEMPLATES / f"{template}.jinja").read_text())
    arguments = trl.SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None, **options
    )
    model = tiny(vocab_size=len(made))
    rows = Dataset.from_list([columns])
    theirs = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=made)
    theirs = theirs.train_dataset[0]
    made = chat((TEMPLATES / f"{template}.jinja").read_text())  # TRL may have changed its template
    ours = only(read_rows([columns])[0], made)
    assert ours["input_ids"] == theirs["input_ids"]
    pairs = list(zip(ours["labels"], theirs["labels"], strict=True))
    odd = [t for o, t in pairs if o != t]
    assert all(not made.decode([t]).strip() for t in odd) and len(odd) < 3
    assert sum(o != IGNORED for o, _ in pairs) >= 3


def test_marks_of_a_template_say_what_is_learned():
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = Conversation(tuple(TALK))
    assert only(row, chat(marked)) == only(row, chat())
    unended = marked.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    made = chat(unended)
    assert learned(only(row, made), made) == "Hello youWell, yes."
    assert learned(only(Conversation(tuple(TALK), 3), made), made) == "Well, yes."


def test_an_answer_that_later_turns_change_is_learned_as_it_is_given():
    """Qwen3 takes thoughts out of earlier answers: no token is learned that is not written so."""
    made = chat((TEMPLATES / "qwen3.jinja").read_text())
    thought = [dict(m) for m in TALK]
    for m in thought:
        if m["role"] == "assistant":
            m["content"] = f"<think>\nSo.\n</think>\n\n{m['content']}"
    found = encode([Conversation(tuple(thought))], made)
    assert found.of == [0, 0] and not found.cut and not found.dropped
    assert [learned(r, made) for r in found.rows] == [
        f"<think>\nSo.\n</think>\n\n{said}<|im_end|>" for said in ("Hello you", "Well, yes.")
    ]
    second = made.decode(found.rows[1]["input_ids"])
    assert second.count("So.") == 1 and "Hello you<|im_end|>" in second


TOOLS = [{"type": "function", "function": {"name": "weigh", "parameters": {"type": "object"}}}]
CALL = [{"type": "function", "function": {"name": "weigh", "arguments": {"kg": 2}}}]
CALLED = [
    {"role": "user", "content": "How heavy?"},
    {"role": "assistant", "content": "", "tool_calls": CALL},
    {"role": "tool", "content": '{"kg": 2}'},
    {"role": "assistant", "content": "Two."},
]


@pytest.mark.parametrize("kept", ["lines", "array", "saved", "text"])
def test_tools_come_through_as_they_were(kept, tmp_path):
    """A table's columns give every turn the keys of all; a template would show them."""
    made = chat((TEMPLATES / "qwen2_5.jinja").read_text())
    other = [{"type": "function", "function": {"name": "weigh", "arguments": {"pound": "4"}}}]
    rows = [
        {"messages": CALLED, "tools": TOOLS},
        {"messages": [CALLED[0], dict(CALLED[1], tool_calls=other)], "tools": TOOLS},
    ]
    if kept == "saved":
        source = tmp_path / "saved"
        Dataset.from_list(rows).save_to_disk(source)
    elif kept == "text":
        source = [dict(r, tools=json.dumps(r["tools"])) for r in rows]
    else:
        source = tmp_path / ("rows.jsonl" if kept == "lines" else "rows.json")
        lines = "\n".join(map(json.dumps, rows))
        source.write_text(lines if kept == "lines" else json.dumps(rows))
    first, second = encode(read_rows(source), made, None).rows
    text = made.apply_chat_template(CALLED, tools=TOOLS, tokenize=False)
    assert made.decode(first["input_ids"]) == text and "weigh" in text
    assert "null" not in made.decode(second["input_ids"])
    assert learned(first, made).startswith('<tool_call>\n{"name": "weigh", "arguments": {"kg": 2}}')
    assert learned(first, made).endswith("Two.<|im_end|>")
    assert "kg" not in learned(second, made)


def test_words_that_a_template_leaves_out_are_refused():
    """Qwen2.5 passes over roles that it does not know: `developer` is then the system."""
    made = chat((TEMPLATES / "qwen2_5.jinja").read_text())
    told = [{"role": "developer", "content": "Be brief."}, *TALK[1:3]]
    text = made.decode(only(Conversation(tuple(told)), made)["input_ids"])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    kept = chat().decode(only(Conversation(tuple(told)), chat())["input_ids"])
    assert kept.startswith("<|im_start|>developer\nBe brief.<|im_end|>")
    deaf = chat(
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"row 0: .* leaves out what turn 2 \(tool\) says"):
        encode([Conversation(tuple(CALLED[:1] + TALK[2:3] + CALLED[2:]))], deaf)
    with pytest.raises(ValueError, match="shows no tools, such as 'weigh'"):
        encode([Conversation(tuple(TALK), tools=tuple(TOOLS))], chat())
    strict = chat((TEMPLATES / "gemma.jinja").read_text())
    with pytest.raises(ValueError, match=r"row 0: .*refuses turns of system, user.*not supported"):
        encode([Conversation(tuple(TALK))], strict)


def test_calls_in_text_are_objects_and_words_may_stand_in_json():
    """As OpenAI writes them; a template that writes JSON would write text in text."""
    made = chat((TEMPLATES / "qwen2_5.jinja").read_text())
    function = {"name": "weigh", "arguments": '{"kg": 2}'}
    said = dict(CALLED[1], tool_calls=[{"type": "function", "id": "1", "function": function}])
    row = {"messages": [CALLED[0], said, *CALLED[2:]], "tools": TOOLS}
    plain = read_rows([{"messages": CALLED, "tools": TOOLS}])
    assert encode(read_rows([row]), made, None).rows == encode(plain, made, None).rows
    jsoned = chat(CHAT.replace("{{ m.content }}", "{{ m.content | tojson }}"))
    told = [TALK[1], TALK[2], {"role": "tool", "content": '{"city": "Zürich"}'}]
    encode([Conversation(tuple(told))], jsoned)
    (row,) = read_rows([{"messages": [{"from": "human", "role": "human", "value": "a"}, TALK[2]]}])
    assert row.messages[0]["role"] == "user"


def test_marks_that_leave_an_answer_out_do_not_decide():
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.index > 2 and "
        "m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = Conversation(tuple(TALK[1:]))
    assert only(row, chat(marked)) == only(row, chat())


def test_an_answer_before_any_question_is_not_learned():
    made = chat()
    opened = ({"role": "assistant", "content": "Welcome."}, *TALK[1:3])
    row = only(Conversation(opened), made)
    assert (
        "Welcome." in made.decode(row["input_ids"]) and learned(row, made) == "Hello you<|im_end|>"
    )
    with pytest.raises(ValueError, match="row 0: has no turn of the assistant"):
        read_rows([{"messages": [*opened[:1], TALK[1]]}])


def test_what_is_too_long_is_told():
    made = chat()
    rows = [exchange("a" * n, "b" * m) for n, m in ((5, 5), (5, 90), (200, 5))]
    found = encode(rows, made, max_length=60)
    assert (found.of, found.cut, found.dropped) == ([0, 1], [1], [2])
    assert len(found.rows[1]["input_ids"]) == 60 and "<|im_end|>" not in learned(
        found.rows[1], made
    )
    said = data.summary(data.Rows(rows, {"messages": 3}, ["id"]), found, made, 60)
    assert said[0] == "3 rows read: 3 of messages." and said[1] == "Not read: the columns id."
    assert "1 row (the first is row 1) is longer than 60 tokens" in said[2]
    assert "1 row (the first is row 2) is left out: what is asked fills 60 tokens" in said[3]
    assert len(encode(rows, made, max_length=None).rows) == 3
    with pytest.raises(ValueError, match="max_length=8; raise it"):
        encode(rows, made, max_length=8)


def test_the_first_row_is_shown_in_pieces():
    made = chat()
    shown = list(data.pieces(only(Conversation(tuple(TALK)), made), made))
    assert [s for s, known in shown if known] == ["Hello you<|im_end|>", "Well, yes.<|im_end|>"]
    assert "".join(s for s, _ in shown) == made.apply_chat_template(TALK, tokenize=False)
