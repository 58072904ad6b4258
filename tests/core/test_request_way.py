"""scripts/request_way.py: how far a reader has to go to follow one request."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "request_way.py"


def test_a_streamed_and_repaired_request_crosses_seven_modules_of_the_guard() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True)
    way = done.stdout.splitlines()[0]
    assert "7 of them in guard/: guard/guard.py -> " in way
    assert set(way.split(": ")[1].split(" -> ")) == {
        f"guard/{name}.py" for name in ("guard", "context", "search", "watch", "holdback", "quality", "announcement")
    }
