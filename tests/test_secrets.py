"""A key is written nowhere, and an address holds none."""

import json

import pytest
from test_exchange import answering, with_body
from test_recipe import GOOD, read

from opdctl.config import secrets
from opdctl.errors import OpdctlError, RecipeError, StageFailed
from opdctl.remote.endpoint import Endpoint, opened

KEY = "sk-0123456789abcdef"


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())


def echo(handler):
    """Answer 401 and repeat all headers, as a debugging proxy does."""
    body = str(dict(handler.headers)).encode()
    handler.send_response(401)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def test_a_key_that_the_server_repeats_is_masked(monkeypatch):
    monkeypatch.setenv("OPDCTL_API_KEY", KEY)
    with answering(echo) as server, pytest.raises(StageFailed, match="Bearer") as caught:
        Endpoint("big", server.url, 5.0).ask("/x")
    assert KEY not in str(caught.value)
    assert "***" in str(caught.value)
    assert server.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize("body", [{"data": [{"id": KEY}]}, {"data": [{KEY: 1}]}, {"data": KEY}])
def test_a_key_in_a_good_answer_is_masked_in_what_is_said(monkeypatch, body):
    class Runtime:
        server_timeout, server_requests = 5.0, 1

    monkeypatch.setenv("OPDCTL_API_KEY", KEY)
    with (
        answering(with_body(json.dumps(body).encode())) as server,
        pytest.raises(OpdctlError) as caught,
    ):
        opened("big", f"{server.url}#other", Runtime, lambda: None)
    assert KEY not in str(caught.value) + caught.value.hint


def test_a_short_key_does_not_tear_up_what_is_read():
    secrets.remember("x")
    assert secrets.masked("an x-ray") == "an x-ray"
    secrets.remember("EMPTY_KEY")
    secrets.remember("EMPTY_KEY_2")
    assert secrets.masked("EMPTY_KEY_2 EMPTY_KEY") == "*** ***"


def test_each_host_may_have_a_key_of_its_own(monkeypatch):
    monkeypatch.setenv("OPDCTL_API_KEY", "any")
    monkeypatch.setenv("OPDCTL_API_KEY_API_EXAMPLE_ORG", "host")
    monkeypatch.setenv("OPDCTL_API_KEY_API_EXAMPLE_ORG_8000", "port")
    assert secrets.key_of("https://api.example.org/v1") == "host"
    assert secrets.key_of("http://API.example.org:8000") == "port"
    assert secrets.key_of("http://other.org:8000") == "any"
    monkeypatch.delenv("OPDCTL_API_KEY")
    assert secrets.key_of("http://other.org:8000") == ""


@pytest.mark.parametrize(
    "address",
    [
        "http://user:pass-word@host:8000",
        "https://pass-word@host/v1#NAME",
        "http://host:8000?api_key=pass-word",
        "http://host/?x=1&access_token=pass-word",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(address):
    override = f"stages.mopd.teachers.math={address}"
    with pytest.raises(RecipeError) as caught:
        read(GOOD, override)
    assert "pass-word" not in str(caught.value)
    assert "OPDCTL_API_KEY" in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        read(GOOD.replace("stage:t_math", address))
    assert "pass-word" not in str(caught.value)


def test_an_address_without_them_is_left_as_it_is():
    text = "see http://host:8000/a@b and mail a@b.org, key=1"
    assert secrets.masked(text) == text
