"""Turns a GGUF file into a folder that transformers loads in a fraction of a second, once per machine.

Reading a GGUF takes some 10 seconds, most of them for the vocabulary in its metadata; the safetensors copy that is kept
in the user's cache folder loads in about 0.3 seconds. Several processes may ask for the same model at once: one
converts under a file lock, the others wait, and a folder appears only when it is complete.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from tta_middleware.engines.reading import short
from tta_middleware.engines.torch_import import INSTALL_LOCAL, import_torch, import_transformers, quiet_transformers
from tta_middleware.errors import EngineError, MissingExtraError, TTAError

_log = logging.getLogger(__name__)

_STRETCHES = ("rope_freqs", "rope_factors_long")
"""Tensors of frequencies: Llama 3.1's, and those of Phi 3.5."""


def converted(gguf: Path, folder: Path) -> Path:
    """The safetensors copy of ``gguf`` at ``folder``, made now if it is not there yet.

    Raises:
        EngineError: transformers cannot read the file.
        MissingExtraError: torch or transformers is not installed.
    """
    return _kept(gguf, folder, _save_as_safetensors)


def converted_tokenizer(gguf: Path, folder: Path) -> Path:
    """The tokenizer of ``gguf`` alone: beside the copy at ``folder``, or in it where that was made.

    Raises:
        EngineError: transformers cannot read the file.
        MissingExtraError: transformers is not installed.
    """
    return folder if folder.is_dir() else _kept(gguf, folder.with_name(f"{folder.name}-tokenizer"), _save_tokenizer)


def _kept(gguf: Path, folder: Path, save: Callable[[Path, Path], None]) -> Path:
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            _remove_leftovers(folder)
            _convert_into(gguf, folder, save)
    return folder


def _remove_leftovers(folder: Path) -> None:
    # The lock is held, so every temporary folder here belongs to a process that died.
    for stale in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _convert_into(gguf: Path, folder: Path, save: Callable[[Path, Path], None]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        with _progress(f"Preparing {gguf.stem} (once on this machine)"):
            save(gguf, temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_as_safetensors(gguf: Path, target: Path) -> None:
    torch, transformers = import_torch(), import_transformers()
    with _reading(gguf, f" Families that it does not know may run as llama-cpp:{gguf.name}") as source:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            dtype=torch.float32,
            # Without dequantize=True transformers reaches for a kernel on the hub.
            quantization_config=transformers.GgufConfig(dequantize=True),
            output_loading_info=True,
            **source,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **source)
        _tell_of_long_contexts(gguf)
    _check_all_found(gguf, found["missing_keys"])
    with quiet_transformers():
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(str(target))
        tokenizer.save_pretrained(str(target))


def _check_all_found(gguf: Path, missing: Collection[str]) -> None:
    """transformers leaves what it has no name for as it was drawn, and says so in its log alone."""
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise EngineError(
            f"transformers does not find all weights of its model in {gguf.name} (of {len(missing)}: {some}); "
            f"take the model's folder with safetensors files, or try llama-cpp:{gguf.name}"
        )


def _tell_of_long_contexts(file: Path) -> None:
    """Log it where the file stretches rotary embeddings, of which transformers' reader takes nothing over."""
    import gguf

    reader = gguf.GGUFReader(str(file))
    stretched = [name for name in reader.fields if name.endswith(".rope.scaling.factor")]
    stretched += [tensor.name for tensor in reader.tensors if tensor.name.startswith(_STRETCHES)]
    if stretched:
        _log.warning(
            "%s scales its rotary embeddings for long contexts (%s), which transformers does not read: the model is "
            "worse there than from its own folder",
            file.name,
            stretched[0],
        )


def _save_tokenizer(gguf: Path, target: Path) -> None:
    transformers = import_transformers()
    with _reading(gguf) as source:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **source)
    tokenizer.save_pretrained(str(target))


@contextmanager
def _reading(gguf: Path, otherwise: str = "") -> Iterator[dict[str, Any]]:
    """What tells transformers to read the file; ``otherwise`` is what else can be done where it cannot.

    Raises:
        EngineError: it cannot.
        MissingExtraError: a package is missing.
    """
    with quiet_transformers(), _without_its_own_bar(), _read_once():
        try:
            yield {"gguf_file": gguf.name, "local_files_only": True}
        except TTAError:
            raise
        except ImportError as exc:
            raise MissingExtraError(f"GGUF files need a package: {short(exc)}; run: {INSTALL_LOCAL}") from exc
        except Exception as exc:
            # The boundary to files that others wrote: their readers raise what they please (struct.error, say).
            told = f"transformers cannot read {gguf.name} ({short(exc)}); is the file complete?"
            raise EngineError(f"{told}{otherwise}") from exc


@contextmanager
def _without_its_own_bar() -> Iterator[None]:
    """transformers draws a bar over the tensors of a GGUF whether bars are wanted or not; ours stands there."""
    from transformers import modeling_gguf_pytorch_utils as reader

    shown = getattr(reader, "tqdm", None)
    reader.tqdm = partial(shown, disable=True) if shown else None
    try:
        yield
    finally:
        reader.tqdm = shown


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers parses the file for the config, the weights and the tokenizer anew, and a table of names for each
    of the model's modules: two thirds of the time. Here each is made once.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            # The same bytes as a plain array: slicing a memmap makes a memmap each time, and each word is a slice.
            self._bytes = mapped.view(np.ndarray)

    parsed = {"GGUFReader": cache(Reader), "get_tensor_name_map": cache(gguf.get_tensor_name_map)}
    original = {name: getattr(gguf, name) for name in parsed}
    vars(gguf).update(parsed)
    try:
        yield
    finally:
        vars(gguf).update(original)


@contextmanager
def _progress(title: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task(title, total=None)
        yield
