"""A guarded batch on Ray: every prompt once, whoever dies on the way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
import ray.data
from tta_ray import Pool, RayJob, answered, run_job
from tta_ray.__main__ import main, parse_actors

from tta_middleware.assembly import AnswerSettings
from tta_middleware.config import Budget
from tta_middleware.errors import ConfigurationError, DataError, EngineError
from tta_middleware.policy import Policy
from tta_middleware.types import Sampling

COUNT = 120
PATIENCE = 300.0
NONE = dict.fromkeys(("failed", "broken", "skipped", "skipped_failed", "skipped_broken"), 0)


def answering(model: str = "staged:plain", moderator: str = "words", **options) -> AnswerSettings:
    parts = {"method": "noise", "policy": Policy(), "sampling": Sampling(64), "budget": Budget(generations=20)}
    return AnswerSettings(model=model, moderator=moderator, allow_download=False, **parts | options)


def prompts(count: int = COUNT) -> list[dict]:
    return [{"id": i, "prompt": f"{('About tree', 'Plan an attack on weed')[i % 2]}{i}"} for i in range(count)]


def records(folder: Path) -> list[dict]:
    path = folder / "answers.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def until(there) -> None:
    end = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def assert_each_once(folder: Path, count: int = COUNT) -> None:
    found = {record["id"]: record["outcome"] for record in records(folder)}
    assert len(found) == len(records(folder))
    assert found == {i: "neutralised" if i % 2 else "clean" for i in range(count)}


def test_two_actors_answer_every_prompt_once(cluster, stage, jsonl, tmp_path) -> None:
    source = jsonl(*prompts(), b"not JSON")
    job = RayJob(source=source, target=tmp_path / "out", answering=answering(), pool=Pool(actors=(2, 2), concurrency=8))
    assert run_job(job) == {**NONE, "clean": 60, "neutralised": 60, "broken": 1}
    broken = [record for record in records(job.target) if "error" in record]
    assert [record["line"] for record in broken] == [COUNT + 1]
    assert run_job(job) == {**NONE, "skipped": COUNT + 1, "skipped_broken": 1}
    assert len(records(job.target)) == COUNT + 1


def test_a_line_may_say_how_it_is_decoded(cluster, stage, jsonl, tmp_path) -> None:
    source = jsonl(prompts(1)[0], {"id": "short", "prompt": "About tree0", "sampling": {"max_new_tokens": 2}})
    run_job(RayJob(source=source, target=tmp_path / "out", answering=answering()))
    long, short = sorted(records(tmp_path / "out"), key=lambda record: str(record["id"]))
    assert (short["finish_reason"], long["finish_reason"]) == ("length", "stop")
    assert long["answer"].startswith(short["answer"])


def test_nothing_is_lost_or_doubled_when_an_actor_is_killed(cluster, stage, jsonl, tmp_path) -> None:
    pool = Pool(actors=(2, 2), concurrency=8)
    job = RayJob(source=jsonl(*prompts()), target=tmp_path / "out", answering=answering("staged:hold"), pool=pool)
    counts: dict[str, int] = {}
    thread = threading.Thread(target=lambda: counts.update(run_job(job)))
    thread.start()
    until(lambda: len(list(stage.glob("held-*"))) == 2 and records(job.target))
    done = len(records(job.target))
    victim = int(next(stage.glob("held-*")).name.removeprefix("held-"))
    os.kill(victim, signal.SIGKILL)
    (stage / "go").touch()
    thread.join(PATIENCE)
    assert counts == {**NONE, "clean": 60, "neutralised": 60}
    assert 0 < done < COUNT
    assert len(list(stage.glob("engine-*"))) == 3
    assert_each_once(job.target)


def test_actors_are_added_while_there_is_more_work_than_one_can_do(cluster, stage, jsonl, tmp_path) -> None:
    pool = Pool(actors=(1, 2), concurrency=8)
    job = RayJob(source=jsonl(*prompts()), target=tmp_path / "out", answering=answering("staged:hold"), pool=pool)
    thread = threading.Thread(target=run_job, args=(job,))
    thread.start()
    until(lambda: len(list(stage.glob("engine-*"))) == 2)
    (stage / "go").touch()
    thread.join(PATIENCE)
    assert_each_once(job.target)


def test_a_job_that_is_killed_goes_on_where_it_was(stage, jsonl, tmp_path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tta_ray", str(jsonl(*prompts())), str(out), "--moderator", "words", "--json"]
    command += ["--actors", "2", "--concurrency", "8"]
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen([*command, "--model", "staged:hold"], stderr=err, stdout=err)
        until(lambda: len(list(stage.glob("held-*"))) == 2 and records(out))
        process.kill()
        process.wait()
    done = len(records(out))
    assert 0 < done < COUNT
    again = subprocess.run([*command, "--model", "staged:plain"], capture_output=True, timeout=PATIENCE, check=True)
    assert json.loads(again.stdout)["skipped"] == done
    assert_each_once(out)


def test_a_prompt_that_kills_its_actor_becomes_an_error_and_the_others_are_answered(
    cluster, stage, jsonl, tmp_path
) -> None:
    source = jsonl(*prompts(10), {"id": "poison", "prompt": "Some poison"})
    pool = Pool(concurrency=1, retries=1)
    job = RayJob(source=source, target=tmp_path / "out", answering=answering(), pool=pool)
    counts = run_job(job)
    assert counts == {**NONE, "clean": 5, "neutralised": 5, "failed": 1}
    [lost] = [record for record in records(job.target) if "error" in record]
    assert lost["id"] == "poison"
    assert lost["error"]["message"] == "lost with its worker 2 times"


def test_a_model_that_cannot_be_loaded_ends_the_job(cluster, stage, jsonl, tmp_path) -> None:
    job = RayJob(source=jsonl(*prompts(4)), target=tmp_path / "out", answering=answering("staged:missing"))
    with pytest.raises(EngineError, match="no such weights"):
        run_job(job)
    assert records(job.target) == []


def test_unknown_parts_are_named_before_anything_starts(jsonl, tmp_path, stage) -> None:
    for parts in ({"moderator": "nobody"}, {"method": "magic"}, {"model": "engin:x"}):
        with pytest.raises(ConfigurationError, match="unknown"):
            run_job(RayJob(source=jsonl(*prompts(1)), target=tmp_path / "out", answering=answering(**parts)))


def test_answers_to_another_file_are_not_taken_for_its_own(cluster, stage, jsonl, tmp_path) -> None:
    run_job(RayJob(source=jsonl(*prompts(1)), target=tmp_path / "out", answering=answering()))
    with pytest.raises(DataError, match="another prompt"):
        run_job(RayJob(source=jsonl({"id": 0, "prompt": "x"}), target=tmp_path / "out", answering=answering()))


def test_a_dataset_is_answered_in_place(cluster, stage, jsonl) -> None:
    dataset = ray.data.read_text(str(jsonl(*prompts(6), b"{}")))
    rows = [json.loads(row["text"]) for row in answered(dataset, answering(), Pool(concurrency=4)).take_all()]
    assert sorted(row["outcome"] for row in rows if "outcome" in row) == ["clean"] * 3 + ["neutralised"] * 3
    assert [row["error"]["type"] for row in rows if "error" in row] == ["DataError"]


def test_the_embedded_model_in_two_actors(cluster, jsonl, tmp_path) -> None:
    texts = ("How is bread baked?", "Name a colour.", "What is a lighthouse?", "Where do owls live?")
    source = jsonl(*({"id": i, "prompt": text} for i, text in enumerate(texts)))
    real = answering("smollm2", "local", sampling=Sampling(8))
    pool = Pool(actors=(2, 2), concurrency=2)
    counts = run_job(RayJob(source=source, target=tmp_path / "out", answering=real, pool=pool))
    assert counts["failed"] == 0
    assert sorted(record["id"] for record in records(tmp_path / "out")) == [0, 1, 2, 3]
    assert all(record["answer"] for record in records(tmp_path / "out"))


@pytest.mark.parametrize("actors", ["x", "0", "3,2"])
def test_the_command_refuses_actors_that_cannot_be(actors, jsonl, tmp_path, capsys, stage) -> None:
    assert main([str(jsonl(*prompts(1))), str(tmp_path / "out"), "--moderator", "words", "--actors", actors]) == 2
    assert "2,8" in capsys.readouterr().err


def test_one_number_of_actors_is_fewest_and_most() -> None:
    assert (parse_actors("4"), parse_actors("2,8")) == ((4, 4), (2, 8))
