"""What is masked, and what is left alone."""

import logging
import sys
from pathlib import Path

import pytest

from gradeclip_ft.results.masking import (
    masked,
    masked_output,
    masked_values,
    secrets_of_environment,
)
from gradeclip_ft.results.record import Result, read


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host/a.tar", "https://***@host/a.tar"),
        ("https://me:p@ss@host/ by http://host/a@b", "https://***@host/ by http://host/a@b"),
        ("s3://b/a.tar?X-Amz-Signature=1&Expires=2 gave 403", "s3://b/a.tar?*** gave 403"),
        ("pipe:curl -H 'Authorization: Bearer abcdefgh' https://h/x", None),
        ("logger.extra.api_key=0123456789", "logger.extra.api_key=***"),
        ("+hub_token='hf_abc'", "+hub_token='***'"),
        ('{"password": "tiger"}', '{"password": "***"}'),
    ],
)
def test_credentials_are_masked(text: str, expected: str | None) -> None:
    shown = masked(text)
    assert "abcdefgh" not in shown
    if expected is not None:
        assert shown == expected
    assert masked(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "python -m gradeclip_ft train +exp=shapes name=a seed=0,1 optim.optimizer.lr=1e-5",
        "data/cc3m-train-{0000..0575}.tar::other/*.tar",
        "tokenizer=auto, tokens 77, key 000041, monkey=3, context: basic words",
        "user@host wrote a.b@c.d; is it so? yes = no",
    ],
)
def test_ordinary_words_stay(text: str) -> None:
    """A mask over too much would make records useless, and resuming blind to changes."""
    assert masked(text) == text


def test_nothing_printed_logged_or_raised_shows_a_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a command prints an address as it stands, and where a library logs one."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MY_TOKEN", "short")
    secrets_of_environment.cache_clear()
    with masked_output():
        print("https://me:hunter2@h/a.tar?X-Amz-Signature=1: 0 of 0 samples usable")
        handler = logging.StreamHandler()
        handler.emit(logging.makeLogRecord({"msg": "sent 0123456789abcdef"}))
        print("api_key=abc", file=sys.stderr)
    secrets_of_environment.cache_clear()
    out, err = capsys.readouterr()
    assert out == "https://***@h/a.tar?*** 0 of 0 samples usable\n"
    assert err == "sent ***\napi_key=***\n"


def test_keys_that_name_a_secret_hide_their_value() -> None:
    value = {"logger": {"extra": {"api_key": "abc", "tags": ["https://a:b@h/", 1]}}, "token": None}
    assert masked_values(value) == {
        "logger": {"extra": {"api_key": "***", "tags": ["https://***@h/", 1]}},
        "token": None,
    }


def test_an_evaluation_holds_no_secret_of_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option may be `${oc.env:...}`; its value would be in every shared JSON file."""
    monkeypatch.setenv("STORE_TOKEN", "correct-horse-battery")
    secrets_of_environment.cache_clear()
    protocol = {"prompt": "correct-horse-battery {}", "by_class": {"token": 0.5}}
    data = {"files": ["https://me:tiger77@host/a.json?Signature=5167"]}
    path = Result("a", {"x": 0.5}, protocol, data, {}, {}).write(tmp_path)
    assert read(path).protocol == {"prompt": "*** {}", "by_class": {"token": 0.5}}
    assert read(path).data == {"files": ["https://***@host/a.json?***"]}
