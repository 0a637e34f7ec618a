import io
import subprocess
import sys

import pytest

from anemoi_dist.telemetry.progress import (
    BarProgress,
    PlainProgress,
    SpeedMeter,
    StepLine,
    format_bytes,
    format_duration,
    format_number,
    open_progress,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def line(step, **changes):
    values = {
        "loss": 0.43217, "lr": 5.94e-3, "grad_norm": 0.8312, "samples_per_s": 412.3, "eta_s": 61.2,
        "memory_bytes": 512 * 2**20,
    }  # fmt: skip
    return StepLine(step=step, **{**values, **changes})


def plain(**options):
    stream = io.StringIO()
    return open_progress(**{"total_steps": 25, "first_step": 0, "interval_steps": 10, **options}, stream=stream), stream


def test_plain_lines_come_for_the_first_step_every_interval_and_at_the_end():
    progress, stream = plain()
    assert isinstance(progress, PlainProgress)
    for step in range(1, 26):
        progress.update(line(step))
    progress.close()
    assert [text.split()[1] for text in stream.getvalue().splitlines()] == ["1/25", "10/25", "20/25", "25/25"]
    assert stream.getvalue().splitlines()[1] == (
        "step 10/25  loss 0.4322  rate 5.94e-03  gradient 0.831  412 samples/s  512 MiB  1:01 left"
    )


def test_a_skipped_update_is_shown_whenever_it_comes():
    progress, stream = plain()
    progress.update(line(2))
    shown = len(stream.getvalue())
    progress.update(line(3, loss=float("nan"), grad_norm=float("inf"), skipped=True))
    assert stream.getvalue()[shown:] == (
        "step  3/25  UPDATE SKIPPED  loss nan  rate 5.94e-03  gradient inf  412 samples/s  512 MiB  1:01 left\n"
    )


def test_the_first_line_has_no_speed_yet():
    progress, stream = plain(interval_steps=1)
    progress.update(line(1, samples_per_s=None, eta_s=None))
    assert stream.getvalue().endswith("- samples/s  512 MiB  time left -\n")


def test_messages_stand_as_they_are():
    progress, stream = plain()
    progress.message("a [table]\n  of scores")
    assert stream.getvalue() == "a [table]\n  of scores\n"


def test_a_terminal_gets_a_bar_with_messages_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    progress = open_progress(total_steps=25, first_step=5, interval_steps=10, stream=stream)
    assert isinstance(progress, BarProgress)
    progress.update(line(6))
    progress.message("scores [bold] of\nthe model")
    progress.update(line(7))
    progress.close()
    shown = stream.getvalue()
    assert "scores [bold] of\nthe model" in shown
    assert shown.rindex("the model") < shown.rindex("7/25")
    assert "1:01 left" in shown
    assert "loss 0.4322  rate 5.94e-03  gradient 0.831  412 samples/s  512 MiB" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    progress = open_progress(total_steps=5, first_step=0, interval_steps=1, stream=Terminal())
    assert isinstance(progress, PlainProgress)


def test_rich_is_not_imported_without_a_terminal():
    code = (
        "import io, sys; from anemoi_dist.telemetry.progress import open_progress;"
        "open_progress(total_steps=1, first_step=0, interval_steps=1, stream=io.StringIO());"
        "print('rich' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


class TestSpeedMeter:
    def meter(self, **options):
        self.now = 0.0
        return SpeedMeter(**{"total_steps": 100, **options}, clock=lambda: self.now)

    def test_start_up_counts_neither_in_speed_nor_in_time_left(self):
        meter = self.meter()
        self.now = 60.0  # the first step took a minute
        meter.add(1, num_samples=8)
        assert (meter.samples_per_s, meter.eta_s) == (None, None)
        self.now += 2
        meter.add(2, num_samples=8)
        assert meter.samples_per_s == pytest.approx(4)
        assert meter.eta_s == pytest.approx(98 * 2)

    def test_the_window_forgets(self):
        meter = self.meter(window_steps=5)
        for step in range(1, 51):
            self.now += 10 if step < 40 else 1
            meter.add(step, num_samples=8)
        assert meter.samples_per_s == pytest.approx(8)
        assert meter.eta_s == pytest.approx(50)

    def test_pauses_slow_the_time_left_and_not_the_speed(self):
        meter, paused_s = self.meter(), 3.0
        for step in range(1, 12):
            self.now += 1
            if step == 6:  # ten steps follow the first; one of them comes after a validation of 20 s
                self.now += 20
                paused_s += 20
            meter.add(step, num_samples=4, paused_s=paused_s)
        assert meter.samples_per_s == pytest.approx(4)
        assert meter.eta_s == pytest.approx(89 * (1 + 2))

    def test_a_resumed_run_has_only_its_own_steps_before_it(self):
        meter = self.meter()
        for step in (91, 92):
            self.now += 1
            meter.add(step, num_samples=1)
        assert meter.eta_s == pytest.approx(8)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.43217, "0.4322"), (12.3456, "12.35"), (98765.4, "98765"), (1.234e-5, "1.234e-05"), (0, "0.000"),
     (float("nan"), "nan"), (-float("inf"), "-inf"), (1.2e7, "1.200e+07")],
)  # fmt: skip
def test_format_number(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (900, "900 B"), (1536, "1.5 KiB"), (512 * 2**20, "512 MiB"), (1.5 * 2**30, "1.5 GiB"),
     (2**41, "2.0 TiB")],
)  # fmt: skip
def test_format_bytes(value, text):
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(7.4, "0:07"), (59.7, "1:00"), (754, "12:34"), (3 * 3600, "3:00:00"), (2 * 86400 + 3 * 3600, "2 d 03:00")],
)
def test_format_duration(value, text):
    assert format_duration(value) == text
