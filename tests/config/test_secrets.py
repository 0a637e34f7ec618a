import pytest
import yaml

from anemoi_dist.config.secrets import redact, redact_values


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("url: https://me:pa%3Ass@host:8080/x", "url: https://***@host:8080/x"),
        ("dataset: 's3://key@bucket/a.zarr'", "dataset: 's3://***@bucket/a.zarr'"),
        ("  aws_secret_access_key: abc/def=", "  aws_secret_access_key: '***'"),
        ("- system.x.password=abc", "- system.x.password='***'"),
        ("{token: 'a b', lr: 1}", "{token: '***', lr: 1}"),
        ("num_tokens: 4\ntoken: null\nmail: a@b.c", "num_tokens: 4\ntoken: null\nmail: a@b.c"),
        ("tokens:\n  password: 12\n", "tokens:\n  password: '***'\n"),
    ],
)
def test_what_is_sent_of_secrets(text: str, sent: str) -> None:
    assert redact(text) == sent
    yaml.safe_load(sent)


def test_values_of_a_tree_without_secrets() -> None:
    options = {"key": "id", "secret": "s", "token": None, "pin_password": 12}
    tree = {
        "dataset": {"path": "s3://me:word@bucket/a.zarr", "options": options},
        "list": ["a", ("http://t@h",)],
        3: 4.5,
    }
    assert redact_values(tree) == {
        "dataset": {
            "path": "s3://***@bucket/a.zarr",
            "options": {"key": "id", "secret": "***", "token": None, "pin_password": "***"},
        },
        "list": ["a", ["http://***@h"]],
        3: 4.5,
    }
    assert options["secret"] == "s"
