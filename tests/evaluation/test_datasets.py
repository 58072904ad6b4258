import pytest

from tta_middleware.errors import DataError
from tta_middleware.evaluation import Prompt, read_prompts
from tta_middleware.types import Message


def test_prompts_and_conversations_are_read_in_order(jsonl):
    path = jsonl(
        "in.jsonl",
        {"id": "a", "prompt": "one", "category": None},
        b"",
        {"prompt": "drei\u00dfig"},
        {"id": 7, "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "four"}]},
    )
    assert read_prompts(path) == [
        Prompt("a", (Message("user", "one"),)),
        Prompt(3, (Message("user", "drei\u00dfig"),)),
        Prompt(7, (Message("system", "Be kind."), Message("user", "four"))),
    ]


def test_instructions_alone_are_a_question(jsonl):
    [prompt] = read_prompts(jsonl("in.jsonl", {"messages": [{"role": "system", "content": "Roses?"}]}))
    assert prompt.messages == (Message("user", "Roses?"),)


def test_a_byte_order_mark_is_no_mistake(jsonl):
    assert read_prompts(jsonl("in.jsonl", b'\xef\xbb\xbf{"prompt": "one"}'))[0].messages[0].content == "one"


def test_the_limit_leaves_the_rest_unread(jsonl):
    path = jsonl("in.jsonl", {"prompt": "one"}, {"prompt": "two"}, b"broken")
    assert [prompt.id for prompt in read_prompts(path, limit=2)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x", "messages": []}, "give 'prompt' or 'messages', not both"),
        ({"messages": "x"}, "'messages' must be a list"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "holds neither a user turn nor an instruction"),
        ({"messages": [{"role": "user"}]}, "message 1: the field 'content' is missing"),
        ({"prompt": None}, "'prompt' must be text, not null"),
        ({"prompt": "x", "id": 1.5}, "'id' must be text or a whole number, not a number"),
        ({"prompt": "x", "id": ""}, "'id' must be text or a whole number, not empty text"),
        (b'{"prompt": ' + b"[" * 100_000, "brackets too deep"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(jsonl, line, message):
    path = jsonl("in.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_text_and_number_of_the_same_look_are_the_same_id(jsonl):
    with pytest.raises(DataError, match="the id '1' was used before, in line 1"):
        read_prompts(jsonl("in.jsonl", {"prompt": "one"}, {"id": "1", "prompt": "two"}))
