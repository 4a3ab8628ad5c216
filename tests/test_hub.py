"""Failures of the hub as sentences. No network: the hub is a closed or a local port."""

from __future__ import annotations

import http.server
import threading
import time
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, errors

from velora.errors import ConfigError
from velora.models import hub
from velora.models.hub import load


@pytest.fixture
def unreachable(monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def fail_with(error: Exception):
    def function() -> None:
        raise error

    return function


def hub_error(cls: type[Exception]) -> Exception:
    return cls("told by the hub", response=SimpleNamespace(headers={}, request=None))  # type: ignore[call-arg]


def test_result_passes_through(unreachable) -> None:
    assert load("x", "y", lambda: 42) == 42


def test_a_closed_port_is_no_hub_and_a_404_is_one(unreachable, monkeypatch) -> None:
    assert not hub._hub_answers()

    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub._hub_answers()
        server.shutdown()


def test_offline_is_set_inside_and_restored(unreachable) -> None:
    import datasets.config

    setting = datasets.config.HF_HUB_OFFLINE
    assert load("x", "y", lambda: (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)) == (True, True)
    assert constants.HF_HUB_OFFLINE is False
    assert setting == datasets.config.HF_HUB_OFFLINE


def test_local_files_ask_no_hub(monkeypatch) -> None:
    monkeypatch.setattr(hub, "_hub_answers", lambda: pytest.fail("asked"))
    assert load("x", "y", lambda: 1, local=True) == 1


@pytest.mark.parametrize("what", ["data set", "tokenizer", "model"])
def test_each_library_fails_within_seconds(unreachable, what: str) -> None:
    """The hub's client by itself retries for 23 to 46 seconds here; what is asserted is that the client made no attempt."""

    def function() -> object:
        if what == "data set":
            from datasets import load_dataset

            return load_dataset("no-such-owner/no-such-name")
        from transformers import AutoConfig, AutoTokenizer

        return (AutoTokenizer if what == "tokenizer" else AutoConfig).from_pretrained("no-such-owner/no-such-name")

    slept: list[float] = []
    original = time.sleep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: slept.append(seconds) or original(0))
        with pytest.raises(ConfigError, match=r"^thing=x cannot be loaded: the hub cannot be reached .*; give DIR$"):
            load("thing=x", "give DIR", function)
    assert not slept


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (hub_error(errors.RepositoryNotFoundError), "the hub has nothing of that name, or it is private"),
        (hub_error(errors.GatedRepoError), "it is gated: accept its licence on the hub and set HF_TOKEN"),
        (OSError("You are trying to access a gated repo."), "it is gated"),
        (ValueError("Unrecognized model in x"), "ValueError: Unrecognized model in x"),
    ],
)
def test_what_the_hub_says_becomes_a_sentence(monkeypatch, error: Exception, sentence: str) -> None:
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    with pytest.raises(ConfigError) as caught:
        load("model.path=x", "give model.path=DIR", fail_with(error))
    assert str(caught.value).startswith(f"model.path=x cannot be loaded: {sentence}")
    assert str(caught.value).endswith("; give model.path=DIR")


def test_a_bug_shows_as_a_bug(unreachable) -> None:
    with pytest.raises(TypeError):
        load("x", "y", fail_with(TypeError("a bug")))
    with pytest.raises(ConfigError, match=r"^said already$"):
        load("x", "y", fail_with(ConfigError("said already")))
