"""What stands in the way of reading a model's files, in errors of ours that say what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

from tta_middleware.errors import ConfigurationError, EngineError, MissingExtraError, ModelNotFoundError, TTAError

What: TypeAlias = Literal["model", "tokenizer", "adapter"]

_LONGEST = 400
_ADVICE: Mapping[What, str] = {
    "model": "see whether all of its files are there and whole",
    "tokenizer": "see whether tokenizer.json is there and whole; with tokenizer.model alone: pip install sentencepiece",
    "adapter": "an adapter fits the model alone that it was made for",
}


@contextmanager
def told(folder: Path, what: What = "model") -> Iterator[None]:
    """Files are read within this: whatever transformers or another library raises then becomes one of these.

    Args:
        folder: where the files are.
        what: whose they are.

    Raises:
        MissingExtraError: a package is missing.
        ModelNotFoundError: files are missing, or are not what their names say.
        ConfigurationError: the model brings code, or this transformers does not know it.
        EngineError: anything else that keeps it from being read.
    """
    name = f"the {what} in {folder.name!r}"
    try:
        yield
    except TTAError:
        raise
    except ImportError as exc:
        raise MissingExtraError(f"{name} needs a package: {short(exc)}") from exc
    except OSError as exc:
        raise ModelNotFoundError(f"{name} is incomplete or broken: {short(exc)}{_pickled(folder)}") from exc
    except Exception as exc:
        # The boundary to files that others wrote: libraries raise what they please over them.
        raise _why(what, name, exc) from exc


def _why(what: What, name: str, exc: Exception) -> TTAError:
    said = str(exc)
    if "trust_remote_code" in said:
        return ConfigurationError(
            f"{name} brings code of its own; trust_remote_code=True runs it, if you trust whoever wrote it"
        )
    if "does not recognize this architecture" in said:
        kind = said.split("`")[1] if said.count("`") > 1 else "another"
        return ConfigurationError(
            f"{name} is of the type {kind!r}, which the installed transformers does not know; a newer one may: "
            "pip install --upgrade transformers"
        )
    if "ignore_mismatched_sizes" in said:
        return EngineError(f"{name} has weights of other sizes than its config.json says; fetch both from one place")
    if type(exc).__name__ == "SafetensorError":
        return EngineError(f"{name} has a broken safetensors file ({short(exc)}); fetch it again")
    return EngineError(f"{name} could not be read: {type(exc).__name__}: {short(exc)}; {_ADVICE[what]}")


def _pickled(folder: Path) -> str:
    if any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin")):
        return ""
    return "; weights are read from safetensors files alone, since pickled ones can run code: convert them"


def short(exc: Exception) -> str:
    """An error's message in a line; some of transformers' list every model that there is."""
    said = " ".join(str(exc).split()).rstrip(".")
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."
