import pytest
import yaml

from anemoi_dist.config.secrets import redact


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
