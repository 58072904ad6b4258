"""``tta serve-moderation``: the embedded moderator as an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated

import typer

from tta_middleware.cli import options as opt


def serve_moderation(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8081,
    moderator: opt.Moderator = "local",
) -> None:
    """Serve /v1/moderations in OpenAI's format, until Ctrl-C.

    With OPENAI_BASE_URL=http://HOST:PORT/v1 the openai client and everything built on it uses this moderator.
    """
    from tta_middleware.moderation.server import serve
    from tta_middleware.registry import resolve_moderator

    serve(host=host, port=port, moderator=resolve_moderator(moderator))
