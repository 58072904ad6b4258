"""``tta chat`` without a text: a conversation in the terminal, its answers streamed as they are checked."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.utils import get_cwidth

from tta_middleware.aio.streams import first_error
from tta_middleware.assembly import AnswerSettings, opened
from tta_middleware.cli import narrate, output
from tta_middleware.errors import ConfigurationError, TTAError
from tta_middleware.guard.events import Finished, Released, RepairFinished, RepairStarted, RepairStep
from tta_middleware.guard.guard import Guard
from tta_middleware.policy import Policy
from tta_middleware.protocols import Engine, Moderator
from tta_middleware.types import GuardedAnswer, Message, Trace

PROMPT: Final = "you> "
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
MARK: Final = "."
"""One for a repair that begins and one for each of its waves; gone when it ends."""


async def converse(answering: AnswerSettings, system: str | None) -> None:
    """Until Ctrl-D or ``/quit``.

    Raises:
        TTAError: the model cannot be loaded.
    """
    async with opened(answering, answering.moderator, loaded=output.loaded) as (engine, moderator):
        opening = [Message("system", system)] if system else []
        await Session(answering, engine, moderator, opening).run()


@dataclass(eq=False)
class Session:
    """One conversation; all of it belongs to the task that runs it.

    Attributes:
        opening: what every conversation begins with.
        talk: the turns since then.
        traces: what happened to the answers, in order; the last is what ``/why`` tells.
    """

    answering: AnswerSettings
    engine: Engine
    moderator: Moderator
    opening: list[Message]
    talk: list[Message] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    over: bool = False

    async def run(self) -> None:
        """Read, answer, again."""
        _dim(f"{self.answering.model}, checked by {self.moderator.name}. /help lists the commands, Ctrl-D ends.")
        lines = self._prompts()
        while not self.over:
            try:
                line = await lines.prompt_async(PROMPT)
            except KeyboardInterrupt:
                continue  # what was typed is dropped
            except EOFError:
                return
            try:
                await self._take(line)
            except TTAError as error:
                _dim(f"tta: {error}")

    async def _take(self, line: str) -> None:
        """A command, or something to answer."""
        if line.startswith("/"):
            await self._command(line)
        elif line.strip():
            await self._answer(line.strip())

    def _prompts(self) -> PromptSession[str]:
        """Lines with history and completion of commands; what was typed is kept in memory only."""
        completer = WordCompleter(list(COMMANDS), sentence=True)
        session: PromptSession[str] = PromptSession(history=InMemoryHistory(), completer=completer)
        session.complete_while_typing = Condition(lambda: session.default_buffer.text.startswith("/"))
        return session

    def guard(self) -> Guard:
        """With the policy as it is now."""
        return self.answering.guard_over(self.engine, self.moderator)

    async def _answer(self, text: str) -> None:
        """One turn. What left before Ctrl-C or an error stays in the conversation, since it stands on the screen."""
        asked = [*self.talk, Message("user", text)]
        said = _Saying()
        answer: GuardedAnswer | None = None
        try:
            async with _stopped_by_interrupt():
                answer = await self._stream([*self.opening, *asked], said)
        finally:
            said.end()
            if said.text:
                self.talk = [*asked, Message("assistant", said.text)]
        if answer is None:
            _dim("stopped")
            return
        self.traces.append(answer.trace)
        if remark := narrate.remark(answer.trace):
            _dim(f"{remark}; /why tells more")

    async def _stream(self, messages: list[Message], said: _Saying) -> GuardedAnswer | None:
        async with aclosing(self.guard().stream(messages, self.answering.sampling)) as events:
            async for event in events:
                match event:
                    case Released(text, "reasoning"):
                        said.think(text)
                    case Released(text):
                        said.say(text)
                    case RepairStarted() | RepairStep():
                        said.mark()
                    case RepairFinished():
                        said.unmark()
                    case Finished(answer):
                        return answer
        return None

    async def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            raise ConfigurationError(f"there is no command {name}; /help lists them, and a space before / sends it")
        await COMMANDS[name][0](self, rest.strip())

    async def help(self, _: str) -> None:
        """The commands."""
        for name, (_do, usage, what) in COMMANDS.items():
            _dim(f"{name + ' ' + usage:<22} {what}")
        _dim("Ctrl-C stops an answer, Ctrl-D ends; arrows bring back what was typed")

    async def why(self, _: str) -> None:
        """The trace of the last answer."""
        if not self.traces:
            raise ConfigurationError("nothing was answered yet")
        output.facts(narrate.story(self.traces[-1], verbose=True))

    async def policy(self, text: str) -> None:
        """Show the policy, or change a threshold: ``0.3``, ``violence=0.1``, or several."""
        if text:
            policy = _changed(self.answering.policy, shlex.split(text))
            changed = replace(self.answering, policy=policy)
            changed.guard_over(self.engine, self.moderator)  # refuses a category that the moderator does not score
            self.answering = changed
        policy = self.answering.policy.with_default(self.moderator.default_threshold)
        own = "".join(f", {name} from {limit:g} on" for name, limit in policy.categories.items())
        _dim(f"flagged from {policy.threshold:g} on{own}")

    async def save(self, name: str) -> None:
        """Turns and traces as JSON, into a file that is not there yet."""
        if not name:
            raise ConfigurationError("give a file: /save talk.json")
        turns = [{"role": turn.role, "content": turn.content} for turn in [*self.opening, *self.talk]]
        told = {"messages": turns, "traces": [trace.as_dict() for trace in self.traces]}
        await anyio.to_thread.run_sync(_write_new, name, json.dumps(told, ensure_ascii=False, indent=2))
        _dim(f"saved to {name}")

    async def new(self, _: str) -> None:
        """Forget the conversation."""
        self.talk, self.traces = [], []
        _dim("a new conversation")

    async def quit(self, _: str) -> None:
        """End."""
        self.over = True


Command = Callable[[Session, str], Awaitable[None]]

_WORDS: Final = re.compile(r"\s+|\S+")

COMMANDS: Final[dict[str, tuple[Command, str, str]]] = {
    "/why": (Session.why, "", "what happened to the last answer"),
    "/policy": (Session.policy, "[0.3] [violence=0.1]", "show thresholds, or set them"),
    "/save": (Session.save, "FILE", "write the conversation and its traces as JSON"),
    "/new": (Session.new, "", "begin a new conversation"),
    "/help": (Session.help, "", "this list"),
    "/quit": (Session.quit, "", "end, as Ctrl-D does"),
}


class _Saying:
    """An answer on its way to the screen."""

    def __init__(self) -> None:
        self.text = ""
        self._marks = 0
        self._column = 0
        self._space = ""
        self._thinks = False

    def say(self, text: str) -> None:
        """Text that was checked; control characters, which could take over a terminal, are left out."""
        self.unmark()
        if self._thinks:
            _write(f"{PLAIN}\n\n")
            self._thinks, self._column, self._space = False, 0, ""
        self.text += text
        for piece in _WORDS.findall(output.printable(text)):
            self._put(piece)

    def think(self, text: str) -> None:
        """Thoughts that were checked: dim, and no part of the answer."""
        self.unmark()
        if not self._thinks:
            _write(DIM)
        self._thinks = True
        for piece in _WORDS.findall(output.printable(text)):
            self._put(piece)

    def _put(self, piece: str) -> None:
        """A word, on a new line if this one has no room for it, or space, which waits for the word behind it."""
        if piece.isspace():
            self._space += piece
            return
        width = get_cwidth(piece)
        broken = "\n" in self._space
        if not broken and self._column + get_cwidth(self._space) + width >= shutil.get_terminal_size().columns:
            self._space, broken = "\n", True
        _write(self._space + piece)
        before = get_cwidth(self._space.rpartition("\n")[2]) + (0 if broken else self._column)
        self._column, self._space = before + width, ""

    def mark(self) -> None:
        """One more sign that a repair is under way."""
        self._marks += 1
        _write(f"{DIM}{MARK}{PLAIN}")

    def unmark(self) -> None:
        """Take the signs away again."""
        count, self._marks = self._marks, 0
        _write("\b \b" * count)

    def end(self) -> None:
        """A line of its own for what follows."""
        self.unmark()
        if self._thinks:
            _write(f"{PLAIN}\n")
        elif self.text:
            _write("\n")


@asynccontextmanager
async def _stopped_by_interrupt() -> AsyncIterator[None]:
    """Ctrl-C ends what is inside, and nothing else; where signals cannot be waited for it ends the program."""
    if sys.platform == "win32":
        yield
        return
    with anyio.open_signal_receiver(signal.SIGINT) as signals:
        try:
            async with anyio.create_task_group() as group:

                async def wait() -> None:
                    async for _ in signals:
                        group.cancel_scope.cancel()

                group.start_soon(wait)
                yield
                group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None


def _changed(policy: Policy, words: list[str]) -> Policy:
    """``policy`` with the thresholds that ``words`` name.

    Raises:
        ConfigurationError: a word is none, a category is unknown, or a threshold out of range.
    """
    settings = dict(policy) | {"categories": dict(policy.categories)}
    for word in words:
        category, equals, number = word.rpartition("=")
        try:
            limit = float(number)
        except ValueError:
            raise ConfigurationError(f"{word!r} is no threshold; write 0.3, or violence=0.1") from None
        if equals:
            settings["categories"][category] = limit
        else:
            settings["threshold"] = limit
    return Policy(**settings)


def _write_new(name: str, text: str) -> None:
    try:
        with Path(name).expanduser().open("x", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise ConfigurationError(f"cannot write {name}: {error.strerror}") from None


def _dim(text: str) -> None:
    _write(f"{DIM}{output.printable(text)}{PLAIN}\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
