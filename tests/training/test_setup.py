"""What a session says of itself."""

from __future__ import annotations

from typing import Any

import pytest
from support import toy

from anemoi_dist.training.setup import _note_scaled_rate, _origin


class Recorder:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.messages: list[str] = []

    def event(self, name: str, *, step: int, **fields: Any) -> None:
        self.events.append({"event": name, "step": step, **fields})

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.parametrize(("scale_with", "was", "now"), [("none", 2, 4), ("world_size", 2, 2)])
def test_an_unchanged_rate_is_not_worth_a_word(scale_with: str, was: int, now: int) -> None:
    config = toy.make_config("ddp", lr={"rate": 0.02, "scale_with": scale_with})
    recorder = Recorder()
    _note_scaled_rate(config, recorder, step=5, was=was, now=now)  # type: ignore[arg-type]
    assert not recorder.events and not recorder.messages


def test_a_rate_that_changes_with_the_ranks_is_shown_and_recorded() -> None:
    config = toy.make_config("ddp", lr={"rate": 0.02, "scale_with": "world_size"})
    recorder = Recorder()
    _note_scaled_rate(config, recorder, step=5, was=2, now=4)  # type: ignore[arg-type]
    (event,) = recorder.events
    assert (event["event"], event["step"], event["rate_was"], event["rate"]) == ("rescaled_rate", 5, 0.04, 0.08)
    assert "4 ranks instead of 2" in recorder.messages[0] and "scale_with=none" in recorder.messages[0]


def test_the_origin_names_the_engine_and_follows_the_configuration() -> None:
    names = {engine: _origin(toy.make_config(engine)).engine for engine in toy.ENGINES}
    assert names == {engine: engine for engine in toy.ENGINES}
    first, second = _origin(toy.make_config("ddp")), _origin(toy.make_config("ddp", rollout=2))
    assert first.config_hash == _origin(toy.make_config("ddp")).config_hash != second.config_hash
    assert first.versions["torch"]
