"""Addresses with passwords are found and shown without them; other text is left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.credentials import holds_credentials, without_credentials
from analysis.records import load
from analysis.tracking import LedgerError

SECRET = "s3cr3t-Wort"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://ann:{SECRET}@host:5000/x", "http://…@host:5000/x"),
        (f"http://{SECRET}@host", "http://…@host"),
        (f"https://:{SECRET}@host", "https://…@host"),
        (f"--tracking-uri=HTTP://ann:{SECRET}@host", "--tracking-uri=HTTP://…@host"),
        (f"postgresql+psycopg://ann:{SECRET}@db/optuna", "postgresql+psycopg://…@db/optuna"),
        (f"s3://key:{SECRET}/with/slashes@bucket/x", "s3://…@bucket/x"),
        (f"http://ann:{SECRET}/5@host:80/a@b", "http://…@b"),
        (f"http://ann:{SECRET}@at@host/", "http://…@host/"),
        (f"postgresql://ann@db/optuna?password={SECRET}&x=1", "postgresql://…@db/optuna?password=…&x=1"),
        (f"https://host/?x=1&access_token={SECRET}", "https://host/?x=1&access_token=…"),
        (f"s3://bucket/x?secret_key={SECRET}", "s3://bucket/x?secret_key=…"),
    ],
)
def test_a_secret_in_an_address_is_found_and_not_shown(text: str, shown: str) -> None:
    assert holds_credentials(text)
    assert without_credentials(text) == shown
    assert not holds_credentials(shown.replace("…@", "").replace("…", ""))


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000",
        "https://host:8080/a@b:c",
        "sqlite:////srv/a@b:c.db",
        "postgresql://ann@db/optuna",
        "s3://bucket/a@b",
        "ann:secret@host",
        "-o dataset.drop_classes=[Hernia]",
        "https://host/?monkey=1&keyboard=2",
        "",
    ],
)
def test_other_text_holds_none(text: str) -> None:
    assert not holds_credentials(text)
    if "ann@" not in text:
        assert without_credentials(text) == text


WORD = st.text(
    st.characters(codec="utf-8", exclude_characters="/?#@ \t\n\r", exclude_categories=("Z", "C")), min_size=1
)


@given(WORD.filter(lambda word: ":" not in word), WORD)
def test_whatever_the_password_nothing_of_it_is_left(user: str, password: str) -> None:
    address = f"https://{user}:{password}@host.example/path"
    assert holds_credentials(address)
    assert without_credentials(address) == "https://…@host.example/path"


def test_a_ledgers_address_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(LedgerError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        load(f"http://ann:{SECRET}@127.0.0.1:1", "ablation")
    assert SECRET not in str(refused.value) and "http://…@127.0.0.1:1" in str(refused.value)
