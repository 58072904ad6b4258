"""A picture of ``tta chat`` in a terminal for the docs; model and moderator follow a script.

python scripts/chat_picture.py                   # docs/images/chat.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import anyio
import matplotlib
from garden_story import BEES_QUESTION, SHED_QUESTION, scores, story
from PIL import Image, ImageDraw, ImageFont

from tta_middleware.assembly import AnswerSettings
from tta_middleware.cli.chat_session import DIM, Session
from tta_middleware.config import Budget
from tta_middleware.policy import Policy
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import Sampling

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "cli"))
from terminal import Terminal  # noqa: E402

FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")
SIZE, LINE = 15, 21
GROUND, TEXT, SOFT, ASKED = "#161b22", "#e6edf3", "#8b98a5", "#5ad1c0"


def converse() -> None:
    """What runs in the terminal."""
    answering = AnswerSettings(
        model="garden-helper",
        moderator="scripted",
        method="race",
        policy=Policy(),
        sampling=Sampling(seed=7),
        budget=Budget(),
    )
    engine = ScriptedEngine(story, step_seconds=0.005, model_id="garden-helper")
    anyio.run(Session(answering, engine, ScriptedModerator("scripted", score=scores), []).run)


def draw(lines: list[str], soft: set[int]) -> Image.Image:
    """The screen; ``soft`` are the lines that the program itself says."""
    font = ImageFont.truetype(str(FONT), SIZE)
    width = round(font.getlength("m") * max(map(len, lines)))
    picture = Image.new("RGB", (width + 40, LINE * len(lines) + 36), GROUND)
    pen = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        colour = ASKED if line.startswith("you>") else SOFT if row in soft else TEXT
        pen.text((20, 18 + row * LINE), line, font=font, fill=colour)
    return picture.quantize(32)


def main() -> None:
    """The picture."""
    terminal = Terminal([sys.executable, __file__, "--inside"], {}, instead={DIM: "\x1b[90m"})
    terminal.prompted()
    for line in (BEES_QUESTION, SHED_QUESTION, "/why", "/policy 0.2"):
        terminal.tell(line)
    lines = terminal.lines[: terminal.row + 1]
    path = ROOT / "docs" / "images" / "chat.png"
    draw(lines, terminal.rows_in("brightblack")).save(path, optimize=True)
    print("\n".join(lines))
    print(f"{path.name}: {path.stat().st_size // 1024} kB")
    terminal.close()


if __name__ == "__main__":
    converse() if "--inside" in sys.argv else main()
