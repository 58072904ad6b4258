"""A model's hash: the same for the same weights wherever they are, another for other weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tta_middleware.profiles.fingerprint import model_hash


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"hidden_size": 4, "transformers_version": "5.1"}))
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 2000)
    return made


def test_a_copy_and_an_engine_prefix_do_not_matter(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert model_hash(str(folder)) == model_hash(str(copy)) == model_hash(f"vllm:{folder}")
    assert len(model_hash(str(folder))) == 16


def test_saving_again_with_another_version_does_not_matter(folder: Path) -> None:
    before = model_hash(str(folder))
    (folder / "config.json").write_text(json.dumps({"transformers_version": "5.9", "hidden_size": 4}, indent=2))
    assert model_hash(str(folder)) == before


@pytest.mark.parametrize("place", [0, 256_000, 511_999])
def test_other_weights_of_the_same_size_have_another_hash(folder: Path, place: int) -> None:
    before = model_hash(str(folder))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[place] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert model_hash(str(folder)) != before


def test_config_and_template_count(folder: Path) -> None:
    seen = {model_hash(str(folder))}
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8}))
    seen.add(model_hash(str(folder)))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(model_hash(str(folder)))
    assert len(seen) == 3


def test_a_gguf_file_and_the_bundled_model_have_one_too(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF" + bytes(100))
    assert len({model_hash(str(tmp_path / "small.gguf")), model_hash("smollm2"), model_hash("other")}) == 3


def test_a_model_that_is_not_here_goes_by_its_reference() -> None:
    assert model_hash("server:some-model") == model_hash("server:some-model") != model_hash("server:another")
