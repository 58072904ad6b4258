"""Batches that end when their reader leaves: LangChain's own let every call run on to its end then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence
from concurrent.futures import as_completed
from contextlib import aclosing, closing, nullcontext
from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_config_list, get_executor_for_config

from tta_middleware.aio.bridge import Calls


class EndingBatches(Runnable[LanguageModelInput, AIMessage]):
    """Batches whose calls are cancelled when the batch ends early: by an error, a break or Ctrl-C.

    The async ones wait until the calls have ended, too; the sync ones leave that to the bridge's loop.
    """

    def batch(
        self, inputs: Sequence[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """An answer per input, in their order; the first error ends the others unless errors are asked for."""
        done = self.batch_as_completed(inputs, config, return_exceptions=return_exceptions, **kwargs)
        with closing(done) as answers:
            found = dict(answers)
        return [found[index] for index in range(len(inputs))]

    def batch_as_completed(
        self,
        inputs: Sequence[Any],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Generator[tuple[int, Any], None, None]:
        """Each answer with the index of its input, as it is done; leaving the loop stops what is under way."""
        configs = get_config_list(config, len(inputs)) if inputs else []
        calls = Calls()

        def call(index: int) -> tuple[int, Any]:
            try:
                with calls.joined():
                    return index, self.invoke(inputs[index], configs[index], **kwargs)
            except Exception as error:
                if return_exceptions:
                    return index, error
                raise

        if len(inputs) < 2:
            yield from map(call, range(len(inputs)))
            return
        with get_executor_for_config(configs[0]) as executor:
            answers = [executor.submit(call, index) for index in range(len(inputs))]
            try:
                for answer in as_completed(answers):
                    yield answer.result()
            finally:
                executor.shutdown(wait=False, cancel_futures=True)
                calls.end()

    async def abatch(
        self, inputs: Sequence[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """An answer per input, in their order; the first error ends the others unless errors are asked for."""
        found: dict[int, Any] = {}
        done = self.abatch_as_completed(inputs, config, return_exceptions=return_exceptions, **kwargs)
        async with aclosing(done) as answers:
            async for index, answer in answers:
                found[index] = answer
        return [found[index] for index in range(len(inputs))]

    async def abatch_as_completed(
        self,
        inputs: Sequence[Any],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """Each answer with the index of its input, as it is done; leaving the loop stops what is under way.

        After a ``break`` the event loop closes the iterator once nothing refers to it any more. With
        ``contextlib.aclosing`` around it, everything has stopped when the block is left.
        """
        configs = get_config_list(config, len(inputs)) if inputs else []
        most = configs[0].get("max_concurrency") if configs else None
        slots = asyncio.Semaphore(most) if most else nullcontext()

        async def call(index: int) -> tuple[int, Any]:
            async with slots:
                try:
                    return index, await self.ainvoke(inputs[index], configs[index], **kwargs)
                except Exception as error:
                    if return_exceptions:
                        return index, error
                    raise

        # No task group: a generator may be closed by another task than the one that reads it.
        tasks = [asyncio.create_task(call(index)) for index in range(len(inputs))]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
