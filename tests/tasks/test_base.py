from __future__ import annotations

import pytest
from support import toy

from anemoi_dist.errors import ConfigError
from anemoi_dist.tasks.base import freeze


def test_what_fits_a_pattern_keeps_its_values() -> None:
    module = toy.make_module(toy.make_config("ddp"))
    freeze(module, ["model.blocks.*", "*.gain"])
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {"model.head.weight", "model.head.bias"}


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (
            ["model.block.*"],
            r"training\.freeze='model\.block\.\*': fits no parameter of the model[\s\S]*model\.blocks\.0",
        ),
        (["*"], "leaves nothing to train"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_one_error(patterns: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        freeze(toy.make_module(toy.make_config("ddp")), patterns)
