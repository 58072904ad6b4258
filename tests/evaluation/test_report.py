"""The report as a reader and a browser get it."""

import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tta_middleware.errors import MissingExtraError
from tta_middleware.evaluation import summarise, to_markdown
from tta_middleware.evaluation.report import series, to_html

HEADLINES = Path(__file__).resolve().parents[2] / "scripts" / "headline_tables.py"

RUN = {
    "command": "tta eval --out b",
    "commands": ["tta eval --out a", "tta eval --methods '<x>'"],
    "model": "smollm2",
    "moderator": "local",
    "versions": {"python": "3.11.7"},
}


@pytest.fixture(scope="module")
def benign(staged) -> list[dict]:
    return [staged("b1", "good", 0.1, 0.1, benign=True), staged("b2", "good", 0.8, 0.1, benign=True)]


@pytest.fixture(scope="module")
def page(comparison, benign) -> str:
    records = comparison() + benign
    return to_html(summarise(records, RUN, intervals=True, reference="none"), records)


class Reader(HTMLParser):
    """Collects text, ids and links; counts tags that are opened and not closed."""

    VOID = ("meta", "path", "use", "rect", "br")

    def __init__(self, page):
        super().__init__()
        self.ids, self.links, self.open, self.said, self.tags = [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(page):
    reader = Reader(page)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    assert all(link.startswith("#") and link[1:] in reader.ids for link in reader.links)
    assert not re.search(r"url\((?!#)|@import|<script|<link", page)
    assert reader.tags.count("svg") == 5


def test_the_page_tells_what_was_found_and_how(page):
    said = " ".join(Reader(page).said)
    for words in (
        "Outcome",
        "Cost and closeness",
        "Against none",
        "Over-refusal",
        "tta eval --out a",
        "--methods '<x>'",
    ):
        assert words in said
    assert "python 3.11.7" in said
    for words in ("Gemma-3-1B, TSA", "278", "59", "5.7", "smollm2, good"):
        assert words in said


def test_no_text_of_an_answer_is_shown_unless_asked_for(page, comparison, flagged_text):
    assert flagged_text[:12] not in page
    assert "calm answer" not in page
    records = comparison()
    shown = to_html(
        summarise(records, RUN), [{**r, "final": {**r["final"], "text": "x" * 500}} for r in records], examples=1
    )
    assert shown.count(flagged_text) == 3
    assert "x" * 80 in shown
    assert "x" * 81 not in shown


def test_the_same_records_give_the_same_page(page, comparison, benign):
    records = comparison() + benign
    assert to_html(summarise(records, RUN, intervals=True, reference="none"), records) == page


def test_a_run_in_which_nothing_was_flagged_has_a_page_without_plots(benign):
    page = to_html(summarise(benign[:1], RUN), benign[:1])
    assert "<svg" not in page
    assert "Over-refusal" in page


def test_survival_ends_at_the_share_that_was_neutralised(comparison, benign):
    methods = series.flagged_by_method(comparison() + benign)
    assert list(methods) == ["none", "good", "costly"]
    tokens, shares = series.survival(methods["costly"])
    assert (tokens[0], shares[0], tokens[-1], shares[-1]) == (0.0, 0.0, 404.0, 0.5)
    assert tokens == sorted(tokens)
    assert shares == sorted(shares)


def test_a_trajectory_is_the_lowest_score_so_far(staged):
    runs = [
        staged("a", "m", 0.9, 0.1, steps=[{"scores": [0.7, 0.8]}, {"scores": [0.9]}, {"scores": [0.2]}]),
        staged("b", "m", 0.9, 0.1, steps=[{"scores": [0.4]}]),
    ]
    assert series.trajectory(runs) == pytest.approx([0.9, 0.55, 0.55, 0.3])


def test_categories_are_the_prompts_or_else_the_moderators(staged):
    records = [staged("a", "m", 0.9, 0.1, category="fraud"), staged("b", "m", 0.9, 0.7), staged("c", "m", 0.9, 0.1)]
    assert series.by_category({"m": records}) == {"illicit (2)": {"m": 0.5}, "fraud (1)": {"m": 1.0}}


def test_over_refusal_counts_only_benign_prompts_and_the_other_rows_leave_them_out(comparison, staged, benign):
    answered = staged("b3", "good", 0.8, 0.1, benign=True, refused=True)
    summary = summarise([*comparison(), *benign, answered], RUN)
    assert summary["methods"]["good"]["prompts"] == 12
    row = summary["over_refusal"]["good"]
    assert (row["prompts"], row["flagged"], row["flagged_and_answered"]) == (3, 2, 1)
    assert row["identical_share"] == pytest.approx(1 / 3)
    assert row["identical_of_not_flagged"] == 1.0
    assert row["refused_after_share"] == pytest.approx(1 / 3)
    assert "flagged by mistake" in to_markdown(summary)


def test_seconds_that_do_not_compare_are_marked(comparison):
    together = [{**record, "concurrency": 4} for record in comparison()]
    assert "1.3*" in to_markdown(summarise(together, RUN))
    assert "*" not in to_markdown(summarise(comparison(), RUN)).splitlines()[3]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, comparison):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"tta-middleware\[eval\]"):
        to_html(summarise(comparison(), RUN), comparison())


def test_the_headline_tables_show_each_judge_and_equal_tokens(comparison, staged, tmp_path, capsys, monkeypatch):
    good, bad = {"score": 0.1, "flagged": False}, {"score": 0.9, "flagged": True}
    judges = {"a": {"baseline": bad, "final": good}, "b": {"baseline": bad, "final": bad}}
    summary = tmp_path / "summary.json"
    records = [*comparison(), staged("j", "judged", 0.9, 0.1, tokens=300, relevance=0.5, judges=judges)]
    summary.write_text(json.dumps(summarise(records, RUN)))
    words = [str(HEADLINES), f"Small={summary}", "--methods", "good,judged,missing"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(HEADLINES), run_name="__main__")
    said = capsys.readouterr().out
    assert "Small; judges: a, b" in said
    assert "| good | 12 x 1 | 12 | 12 (76% to 100%) | - | 0.60 | 0% | 134 |" in said
    assert "| judged | 1 x 1 | 1 | 1 (21% to 100%) | 1 / 0 | 0.50 | 0% | 300 |" in said
    assert "| judged | 1 | 0% (0% to 79%) | 0% (0% to 79%) | 100% (21% to 100%) |" in said
    assert "costly" not in said
