"""kill -9 in the middle of a batch: no record is lost and none comes twice."""

import gzip
import json

import pytest

STAGED = ("--model", "staged:plain", "--moderator", "words")
HANGING = ("--model", "staged:hanging", "--moderator", "words", "--concurrency", "4")
COUNT = 40


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("out.jsonl", "input"),
        pytest.param("out.jsonl.gz", "completed", marks=pytest.mark.slow),
        pytest.param("out.jsonl", "completed", marks=pytest.mark.slow),
        pytest.param("out.jsonl.gz", "input", marks=pytest.mark.slow),
    ],
)
def test_a_batch_that_is_killed_again_and_again_ends_with_every_record_once(
    tta, tta_process, jsonl, tmp_path, name, order
):
    kinds = ("About tree", "Plan an attack on weed")
    source = jsonl("in.jsonl", *({"id": i, "prompt": f"{kinds[i % 2]}{i}"} for i in range(COUNT)))
    out = tmp_path / name
    for steps in (900, 1431):
        process = tta_process("batch", source, out, *HANGING, "--order", order, steps=steps)
        assert process.stderr.readline() == b"hanging\n"
        process.kill()
        process.wait()
    left = tta("batch", source, out, *STAGED, "--order", order, "--json").objects[0]
    content = gzip.decompress(out.read_bytes()) if name.endswith(".gz") else out.read_bytes()
    records = [json.loads(line) for line in content.splitlines()]
    assert sorted(record["id"] for record in records) == list(range(COUNT))
    assert {record["outcome"] for record in records if record["id"] % 2} == {"neutralised"}
    assert {record["outcome"] for record in records if not record["id"] % 2} == {"clean"}
    assert 0 < left["skipped"] < COUNT
    if order == "input":
        assert [record["id"] for record in records] == list(range(COUNT))
