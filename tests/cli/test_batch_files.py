"""What a batch reads from and writes to: pipes, gzip files, files that another process holds or a kill has torn."""

import gzip
import json
import os
import pty
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tta_middleware.errors import DataError
from tta_middleware.files.gzip import Gunzip

STAGED = ("--model", "staged:plain", "--moderator", "words")
PROMPTS = [{"id": f"p{i}", "prompt": f"About tree{i}"} for i in range(12)]


def lines(*objects: object) -> bytes:
    return b"".join(json.dumps(thing).encode() + b"\n" for thing in objects)


def read(path) -> list[dict]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.splitlines()]


def ids(path) -> list:
    return [record["id"] for record in read(path)]


def test_stdin_to_stdout(tta):
    ran = tta("batch", "-", "-", *STAGED, stdin=lines(*PROMPTS))
    assert ran.code == 0
    assert [record["id"] for record in ran.objects] == [prompt["id"] for prompt in PROMPTS]
    assert ran.err == "stdout: 12 clean\n"


def test_with_answers_on_stdout_the_summary_goes_to_stderr(tta):
    ran = tta("batch", "-", "-", *STAGED, "--json", stdin=lines(PROMPTS[0]))
    assert [record["id"] for record in ran.objects] == ["p0"]
    assert json.loads(ran.err)["clean"] == 1


def test_a_pipe_gets_its_answers_while_it_is_open(tta_process):
    process = tta_process("batch", "-", "-", *STAGED)
    for prompt in PROMPTS[:3]:
        process.stdin.write(lines(prompt))
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == prompt["id"]
    assert process.communicate() == (b"", b"stdout: 3 clean\n")
    assert process.returncode == 0


def test_an_interrupt_ends_a_batch_that_waits_for_its_pipe(tta_process, tmp_path):
    process = tta_process("batch", "-", "-", *STAGED)
    process.stdin.write(lines(PROMPTS[0]))
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(2)
    assert process.wait() == 130


def test_a_reader_that_goes_away_ends_the_batch_quietly(tta_process):
    reader, writer = os.pipe()
    process = tta_process("batch", "-", "-", *STAGED, stdout=writer)
    os.close(reader)
    os.close(writer)
    _out, err = process.communicate(lines(PROMPTS[0]))
    assert (process.returncode, err) == (1, b"")


def test_a_pipe_is_taken_up_where_it_was_cut_off(tta, tmp_path):
    out = tmp_path / "out.jsonl"
    tta("batch", "-", out, *STAGED, stdin=lines(*PROMPTS[:5]))
    ran = tta("batch", "-", out, *STAGED, "--json", stdin=lines(*PROMPTS))
    assert (ran.objects[0]["skipped"], ran.objects[0]["clean"]) == (5, 7)
    assert ids(out) == [prompt["id"] for prompt in PROMPTS]


def test_an_id_twice_in_a_pipe_is_an_error_of_its_line(tta):
    ran = tta("batch", "-", "-", *STAGED, stdin=lines(PROMPTS[0], PROMPTS[1], PROMPTS[0]))
    assert ran.code == 2
    *answered, twice = ran.objects
    assert [record["id"] for record in answered] == ["p0", "p1"]
    assert twice["error"]["message"] == "stdin:3: the id 'p0' was used before, in line 1"


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
OVERRIDES = st.dictionaries(
    st.sampled_from(["max_new_tokens", "temperature", "top_p", "seed", "stop"]), ANY, max_size=3
)
RECORD = st.fixed_dictionaries(
    {"prompt": st.just("About trees")},
    optional={"id": ANY, "messages": ANY, "sampling": OVERRIDES | ANY, "category": ANY},
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(RECORD.map(json.dumps).map(str.encode) | ANY.map(json.dumps).map(str.encode) | st.binary(), min_size=1))
def test_every_line_gets_one_record_whatever_it_holds(tta, given_lines):
    data = b"".join(line.replace(b"\n", b" ") + b"\n" for line in given_lines)
    asked = [line for line in data.split(b"\n") if line.strip()]
    if data.startswith(b"\x1f\x8b"):
        return
    ran = tta("batch", "-", "-", *STAGED, stdin=data)
    assert ran.code in (0, 2)
    assert len(ran.objects) == len(asked)
    assert ran.code == 2 * (not asked or any("error" in record for record in ran.objects))


def test_an_empty_pipe(tta):
    ran = tta("batch", "-", "-", *STAGED, stdin=b"\n")
    assert (ran.code, ran.out) == (2, "")
    assert "stdin holds no prompt" in ran.err


def test_a_line_without_end_in_sight_is_an_error_and_the_next_is_read(tta, monkeypatch):
    monkeypatch.setattr("tta_middleware.files.lines.Lines.__init__.__defaults__", (100,))
    ran = tta("batch", "-", "-", *STAGED, stdin=lines({"prompt": "x" * 200}, PROMPTS[0]))
    assert ran.code == 2
    broken, answered = ran.objects
    assert broken["error"]["message"].startswith("stdin:1: longer than")
    assert answered["id"] == "p0"


def test_gzip_in_and_out(tta, tmp_path):
    source, out = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl.gz"
    source.write_bytes(gzip.compress(lines(*PROMPTS[:6])) + gzip.compress(lines(*PROMPTS[6:])))
    assert tta("batch", source, out, *STAGED, "--concurrency", "2").code == 0
    assert ids(out) == [prompt["id"] for prompt in PROMPTS]
    assert tta("batch", source, out, *STAGED, "--json").objects[0]["skipped"] == 12
    assert tta("batch", "-", "-", *STAGED, stdin=source.read_bytes()).objects[0]["id"] == "p0"


def test_cut_off_gzip_from_a_pipe_is_told_after_its_whole_lines_are_answered(tta):
    packed = zlib.compressobj(wbits=31)
    data = packed.compress(lines(*PROMPTS[:3])) + packed.flush(zlib.Z_SYNC_FLUSH)
    ran = tta("batch", "-", "-", *STAGED, stdin=data)
    assert ran.code == 2
    assert [record["id"] for record in ran.objects] == ["p0", "p1", "p2"]
    assert ran.err == "tta: stdin: the gzip data is cut off\n"


def test_damaged_gzip_is_refused_before_any_work(tta, tmp_path):
    source, out = tmp_path / "in.gz", tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress(lines(*PROMPTS))[:-8] + b"trailer!")
    ran = tta("batch", source, out, *STAGED)
    assert (ran.code, ran.err) == (2, f"tta: {source}: the gzip data is damaged\n")
    assert not out.exists()


@given(
    data=st.binary(min_size=3, max_size=200),
    sizes=st.lists(st.integers(1, 9), min_size=1),
    members=st.integers(1, 3),
    padding=st.integers(0, 20),
)
def test_gzip_is_unpacked_however_it_arrives(data, sizes, members, padding):
    packed = gzip.compress(data) * members + b"\0" * padding
    unpack, at, out = Gunzip("x"), 0, b""
    while at < len(packed):
        size = sizes[at % len(sizes)]
        out, at = out + unpack.feed(packed[at : at + size]), at + size
    assert out + unpack.finish() == data * members


def test_a_single_byte_is_no_gzip():
    plain, cut = Gunzip("x"), Gunzip("x")
    assert plain.feed(b"\x1f") + plain.finish() == b"\x1f"
    assert cut.feed(b"\x1f\x8b") == b""
    with pytest.raises(DataError, match="x: the gzip data is cut off"):
        cut.finish()


@pytest.fixture
def answered(tta, jsonl, tmp_path, request):
    """A file of prompts, that of its answers, and what is in that."""
    source, out = jsonl("in.jsonl", *PROMPTS), tmp_path / request.param
    tta("batch", source, out, *STAGED, "--concurrency", "1")
    return source, out, out.read_bytes()


@pytest.mark.parametrize("answered", ["out.jsonl", pytest.param("out.jsonl.gz", marks=pytest.mark.slow)], indirect=True)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.0, 1.0), zeros=st.booleans())
def test_an_output_torn_anywhere_is_completed_with_every_record_once(tta, answered, share, zeros):
    source, out, whole = answered
    cut = int(share * len(whole))
    out.write_bytes(whole[:cut] + b"\0" * 10 * zeros)
    assert tta("batch", source, out, *STAGED).code == 0
    assert ids(out) == [prompt["id"] for prompt in PROMPTS]


def test_two_processes_never_write_one_file(tta, tta_process, jsonl, tmp_path):
    source, out = jsonl("in.jsonl", *PROMPTS), tmp_path / "out.jsonl"
    holder = tta_process("batch", source, out, "--model", "staged:hanging", "--moderator", "words", steps=0)
    assert holder.stderr.readline() == b"hanging\n"
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    for target in (out, link):
        ran = tta("batch", source, target, *STAGED)
        assert ran.code == 2
        assert ran.err == f"tta: another process is writing to {target}; wait for it, or give another output\n"
    holder.kill()
    holder.wait()
    assert tta("batch", source, out, *STAGED).code == 0
    assert len(ids(out)) == 12


def test_a_file_of_prompts_is_not_taken_for_answers(tta, jsonl, tmp_path):
    source, other = jsonl("in.jsonl", *PROMPTS), jsonl("other.jsonl", *PROMPTS)
    before = other.read_bytes()
    ran = tta("batch", source, other, *STAGED)
    assert (ran.code, ran.err) == (2, f"tta: {other}:1: not an answer of this command; give another output\n")
    assert other.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip at all", "damaged, or not a gzip file of this command; give another output"),
        (gzip.compress(b"Dear diary")[:-3], "damaged, or not a gzip file of this command; give another output"),
        (gzip.compress(b'{"answer": ""}'), "1: the last line has no end; give another output"),
        (gzip.compress(b"Dear diary\n"), "1: not valid JSON (Expecting value at column 1)"),
    ],
    # Of its own, since gzip writes the time: processes that run the tests side by side must name them alike.
    ids=["plain", "cut off", "no line end", "no JSON"],
)
def test_a_gzip_output_that_is_something_else_is_left_alone(tta, jsonl, tmp_path, content, message):
    out = tmp_path / "out.gz"
    out.write_bytes(content)
    ran = tta("batch", jsonl("in.jsonl", *PROMPTS), out, *STAGED)
    assert ran.code == 2
    assert message in ran.err
    assert out.read_bytes() == content


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_batch_with_one_line(tta, jsonl):
    ran = tta("batch", jsonl("in.jsonl", *PROMPTS), "/dev/full", *STAGED)
    assert (ran.code, ran.err) == (1, "tta: No space left on device: /dev/full\n")


def test_a_named_pipe_takes_the_answers(tta_process, jsonl, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = tta_process("batch", jsonl("in.jsonl", *PROMPTS), pipe, *STAGED)
    with pipe.open("rb") as reader:
        assert [json.loads(line)["id"] for line in reader] == [prompt["id"] for prompt in PROMPTS]
    assert process.wait() == 0


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_that_is_none(tta, jsonl, tmp_path, shard):
    ran = tta("batch", jsonl("in.jsonl", *PROMPTS), tmp_path / "out.jsonl", *STAGED, f"--shard={shard}")
    assert ran.code == 2
    assert f"--shard takes i/n with i from 1 to n, such as 2/4, not '{shard}'" in ran.err


@pytest.mark.parametrize("target", ["-", "out.jsonl"])
def test_a_terminal_shows_progress_unless_the_answers_go_there(tta_process, jsonl, tmp_path, target):
    ours, theirs = pty.openpty()
    source = jsonl("in.jsonl", *PROMPTS[:3])
    process = tta_process("batch", source, target, *STAGED, stdout=theirs, stderr=theirs, cwd=tmp_path)
    os.close(theirs)
    shown = b""
    with suppress(OSError):
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert process.wait() == 0
    assert (b"3/3" in shown, b'"answer"' in shown) == (target != "-", target == "-")
    assert (b"/s" in shown) == (target != "-")


def test_utf_16_is_named_as_what_it_is(tta, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "Roses?"}', encoding="utf-16")
    assert "UTF-16, not UTF-8; iconv" in tta("batch", source, "-", *STAGED).out
