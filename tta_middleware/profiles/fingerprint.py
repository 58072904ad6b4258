"""What identifies a model's weights: a hash that is quick, and the same on every machine and in every folder.

It covers the configuration without the entries that change when a model is only saved again, the chat template, and
of every weights file the size and three blocks of 64 KiB (beginning, middle, end). A fine-tune changes those; a
rename or a copy does not. A model whose files are not at hand, behind a server say, goes by its reference. It is no
protection against somebody who forges a file on purpose.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tta_middleware.engines.models import BUNDLED, describe_model
from tta_middleware.errors import MissingExtraError, ModelNotFoundError

_BLOCK = 64 * 1024
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype"})


def model_hash(ref: str) -> str:
    """16 hexadecimal digits for a model reference as the engines take it.

    A prefix that names an engine (``vllm:/path``) is left out of account: the weights are the same.
    """
    source = _source(ref)
    if source is None:
        _, colon, rest = ref.partition(":")
        source = _source(rest) if colon else None
    try:
        return _digest(_parts(source) if source else [b"reference", ref.encode()])
    except OSError:
        return _digest([b"reference", ref.encode()])


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        # Lengths keep two different lists of parts from running into the same bytes.
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.hexdigest()[:16]


def _source(ref: str) -> Path | None:
    path = Path(ref).expanduser()
    # A .gguf file is not described, since that reads all of it.
    if ref not in BUNDLED and path.suffix == ".gguf" and path.is_file():
        return path
    try:
        return describe_model(ref).source
    except (ModelNotFoundError, MissingExtraError):
        return None


def _parts(source: Path) -> Iterator[bytes]:
    if source.is_file():
        yield from _blocks(source)
        return
    yield _config(source / "config.json")
    template = source / "chat_template.jinja"
    yield template.read_bytes() if template.is_file() else b""
    for weights in sorted(source.glob("*.safetensors")):
        yield weights.name.encode()
        yield from _blocks(weights)


def _config(path: Path) -> bytes:
    raw = path.read_bytes()
    try:
        entries = json.loads(raw)
    except ValueError:
        return raw
    kept = {key: value for key, value in entries.items() if key not in _VOLATILE}
    return json.dumps(kept, sort_keys=True).encode()


def _blocks(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield size.to_bytes(8)
    with path.open("rb") as file:
        for start in (0, max(0, size // 2 - _BLOCK // 2), max(0, size - _BLOCK)):
            file.seek(start)
            yield file.read(_BLOCK)
