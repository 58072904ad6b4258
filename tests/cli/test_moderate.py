import json
import subprocess

from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.files.lines import Lines, batches

MILD = {"id": "a", "text": "Water the tomatoes in the morning."}


def test_a_text_is_scored_for_people_and_for_machines(tta):
    assert tta("moderate", "a bad thing", "--moderator", "words").out.startswith("flagged: 0.900 (illicit)\n")
    ran = tta("moderate", "--moderator", "words", "--json", stdin=b"a good thing")
    assert ran.code == 0
    assert ran.objects[0]["flagged"] is False
    assert ran.objects[0]["score"] == 0.05
    assert ran.objects[0]["categories"]["illicit"] == 0.05


def test_the_embedded_moderator_scores_lines_with_all_categories(tta, jsonl):
    ran = tta("moderate", "--jsonl", jsonl("in.jsonl", MILD, {"text": ""}))
    assert ran.code == 0
    first, second = ran.objects
    assert first["id"] == "a"
    assert "id" not in second
    assert first["flagged"] is False
    assert len(first["categories"]) == 13
    assert first["score"] == max(first["categories"].values())


def test_the_threshold_moves_the_flag_and_not_the_score(tta, jsonl):
    path = jsonl("in.jsonl", {"text": "bad"})
    ran = tta("moderate", "--jsonl", path, "--moderator", "words", "--threshold", "0.95")
    assert (ran.objects[0]["flagged"], ran.objects[0]["score"]) == (False, 0.9)


def test_broken_lines_get_an_error_in_their_place_and_the_rest_goes_on(tta, jsonl):
    path = jsonl(
        "in.jsonl",
        {"id": 1, "text": "one"},
        b'{"id": 2, "text": ',
        b'{"text": "\xff"}',
        [1, 2],
        {"id": 5},
        {"id": 6, "text": 7},
        b"",
        b'{"id": 8, "text": "\\ud800"}',
        {"id": True, "text": "x"},
        {"id": 10, "text": "ten"},
    )
    ran = tta("moderate", "--jsonl", path, "--moderator", "words")
    assert ran.code == 2
    first, *broken, last = ran.objects
    assert (first["id"], last["id"]) == (1, 10)
    assert [item["error"]["message"].removeprefix(str(path)) for item in broken] == [
        ":2: not valid JSON (Expecting value at column 19)",
        ":3: not UTF-8 (byte 0xff at position 11)",
        ":4: a JSON object is needed, such as {...}, not a list",
        ":5: the field 'text' is missing",
        ":6: 'text' must be text, not a number",
        ":8: 'text' holds half of a surrogate pair, which is no text",
        ":9: 'id' must be text or a whole number, not true or false",
    ]
    assert broken[3]["id"] == 5


def test_a_moderator_that_goes_down_ends_the_run_with_exit_code_1(tta, jsonl):
    path = jsonl("in.jsonl", *({"text": f"line {i}"} for i in range(64 * 4)))
    ran = tta("moderate", "--jsonl", path, "--moderator", "downlater")
    assert ran.code == 1
    assert len(ran.objects) == 64 * 3
    assert ran.err == "tta: the moderator could not be reached\n"


def test_an_endless_pipe_gets_its_answers_while_it_is_open(tta_process):
    process = tta_process("moderate", "--jsonl", "-", "--moderator", "words")
    for text in ("good", "bad", "good"):
        process.stdin.write(json.dumps({"text": text}).encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["flagged"] is (text == "bad")
    process.stdin.write(b'{"text": "no line end"}')
    out, err = process.communicate()
    assert json.loads(out)["flagged"] is False
    assert (process.returncode, err) == (0, b"")


def test_a_reader_that_leaves_ends_the_run_quietly(tta_process, jsonl):
    path = jsonl("in.jsonl", *({"text": f"line {i}"} for i in range(5000)))
    process = tta_process("moderate", "--jsonl", path, "--moderator", "words")
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 1
    assert process.stderr.read() == b""


def test_a_reader_that_leaves_before_the_last_flush_is_quiet_too(tta_process):
    process = tta_process("moderate", "good", "--moderator", "words", stdin=subprocess.DEVNULL)
    process.stdout.close()
    assert process.wait() == 1
    assert process.stderr.read() == b""


@given(
    lines=st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=12),
    cuts=st.lists(st.integers(1, 7), max_size=40),
    ended=st.booleans(),
)
def test_lines_do_not_depend_on_how_the_bytes_arrive(lines, cuts, ended):
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    sizes = iter(cuts)
    rest = memoryview(data)

    def read(_most: int) -> bytes:
        nonlocal rest
        size = next(sizes, 3)
        piece, rest = bytes(rest[:size]), rest[size:]
        return piece

    expected = [(n, line) for n, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    assert [line for group in batches(read, 2) for line in group] == expected


def test_a_line_beyond_the_bound_is_skipped_without_being_kept():
    lines = Lines(longest=10)
    got = [*lines.feed(b"x" * 8), *lines.feed(b"y" * 8), *lines.feed(b"z\nshort\n"), *lines.finish()]
    assert got == [(1, None), (2, b"short")]
