import html.parser
import re
import sys

import pytest
from support.recorded import MEMORY, fill, write_steps

from anemoi_dist.errors import ConfigError, PreflightError
from anemoi_dist.report.page import memory, time_spent, write_report
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import EventLog, read_events

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Collects the text, the attributes that fetch something, and whether the tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.words, self.links, self.open, self.images = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href", "xlink:href", "srcset", "action")]
        if ("role", "img") in attributes:
            self.images.append(dict(attributes).get("aria-label"))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(run):
    path = write_report(run)
    assert path == run.report_dir / "index.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The page of a finished run; drawn once, for all who only read it."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "default-1")
    run.create()
    fill(run)
    with run.events_file.open("ab") as stream:
        stream.write(b'{"event":"step","st')  # a torn last line is no obstacle
    return write_report(run).read_text(encoding="utf-8")


def test_the_page_says_what_happened(text):
    page = Page(text)
    assert page.open == []
    for words in (
        "default-1 finished",
        "1.27 hPa",
        "26 % below the best baseline",
        "2 of 2 combinations",
        "of 100, 1 skipped",
        "zero2",
        "1 234 567",
        "torch 2.13.0",
        "Tide + damped tendency",
        "Forecast +6 h, valid 2025-12-26 18:00",
        "80 % of 1:40 went into training steps. One attempt still runs or was killed",
        "exp_avg_slow",
        "step 50",
        "2 attempts",
    ):
        assert words in page.text


def test_the_page_needs_nothing_from_outside(text):
    links = Page(text).links
    assert len(links) > 10
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.findall(r"@import|<script|<link|url\((?!#)", text)
    assert "default-src 'none'" in text


def test_every_picture_has_words(text):
    images = Page(text).images
    assert len(images) == 3 + 6 + 6 + 1  # skill, maps, curves, the bar of the time
    assert all(images)


def test_what_users_write_is_text(text):
    assert "&lt;b&gt;&amp;bold" in text
    assert "<b>" not in text


def test_a_run_that_has_only_started_has_a_page(run):
    log = EventLog(run.events_file)
    log.write("start", step=0)
    page = page_of(run)
    assert "No optimizer step has been recorded yet" in page.text
    write_steps(log, [1])
    page = page_of(run)
    assert page.open == []
    for words in (
        "default-1 planned",
        "Nothing has been scored yet",
        "No forecast has been drawn yet",
        "Known when an attempt has come to its end",
        "The run has not recorded it",
        "Optimizer steps 1",
    ):
        assert words in page.text


def test_an_unknown_run_names_those_that_exist(finished_run):
    with pytest.raises(ConfigError, match="is no run below") as caught:
        write_report(RunDirectory(finished_run.path.parent / "default-2"))
    assert caught.value.valid == ("default-1",)
    assert "nearest: default-1" in str(caught.value)
    assert not (finished_run.path.parent / "default-2").exists()


def test_a_run_without_events_and_an_empty_root_are_named(run):
    with pytest.raises(ConfigError, match="has no events yet"):
        write_report(run)
    with pytest.raises(ConfigError, match=r"train first, or set run\.root"):
        write_report(RunDirectory(run.path / "nowhere" / "x"))


def test_a_missing_package_is_named_with_the_fix(finished_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(PreflightError, match=r"pip install 'anemoi-dist\[report\]'"):
        write_report(finished_run)


@pytest.mark.parametrize(
    ("recorded", "columns"),
    [
        ([MEMORY, MEMORY], ["rank 0", "rank 1"]),
        ([{**MEMORY, "parameters": size} for size in (5, 4096, 8192, 6, 7)], ["smallest", "largest"]),
    ],
)
def test_memory_by_rank(recorded, columns):
    found = memory([{"event": "start", "step": 0, "memory": recorded}])
    assert found.columns == columns
    assert [row.name for row in found.rows] == ["parameters", "fp32 masters", "exp_avg_fast", "exp_avg_slow"]
    assert found.rows[2].cells == ["1.0 KiB"] * len(columns)
    assert found.totals[-1] == ("12.0 KiB" if "largest" in columns else "8.0 KiB")
    assert sum(row.percents[-1] for row in found.rows) == pytest.approx(100)


def test_memory_that_is_not_recorded_is_none():
    assert memory([{"event": "start", "step": 0}]) is None
    assert memory([]) is None


def test_time_is_summed_over_attempts_that_ended(finished_run):
    events = read_events(finished_run.events_file)
    events.append({"event": "end", "step": 100, "seconds": {"step": 100.0, "data": None}})
    found = time_spent(events)
    assert [phase.seconds for phase in found.phases] == ["5.0", "1.0", "180", "10.0", "4.0"]
    assert (found.useful, found.num_unfinished) == ("90 %", 0)
    assert time_spent(events[:3]) is None
