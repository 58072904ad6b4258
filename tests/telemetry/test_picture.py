"""scripts/trace_picture.py: a row for each span, children under their parents."""

from __future__ import annotations

from xml.etree import ElementTree

from memory import Memory, ask, guard, read
from script_modules import script_module


async def test_the_picture_has_a_row_for_each_span_and_a_dot_for_each_verdict(memory: Memory) -> None:
    await read(guard().stream(ask("late")))
    drawing = script_module("scripts/trace_picture.py")
    rows = list(drawing.tree(memory.spans))
    assert len(rows) == len(memory.spans)
    assert next(depth for depth, _ in rows) == 0
    assert {depth for depth, span in rows if span.name == "repair wave"} == {1}
    assert max(depth for depth, _ in rows) == 2
    picture = ElementTree.fromstring(drawing.picture(memory.spans))
    bars = [one for one in picture if one.tag.endswith("rect")]
    dots = [one for one in picture if one.tag.endswith("circle")]
    assert len(bars) == len(rows) + 1
    assert len(dots) == sum(len(span.events) for span in memory.spans)
