"""Loading from the model hub, so that a failure is one sentence within seconds.

The hub's client retries a lost connection for about half a minute per file. Here one short request asks first whether
the hub answers at all; if it does not, the client works from its cache alone and a miss fails at once. Whatever goes wrong then
becomes a ConfigError that says which key points to local files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from velora.errors import ConfigError

T = TypeVar("T")

PROBE_SECONDS = 4.0
SHOWN_CHARACTERS = 300  # of a library's message
_FILE_ERRORS = {
    "HTTPError", "EntryNotFoundError", "SafetensorError", "UnpicklingError", "PanicException", "StrictDataclassError",
    "DatasetGenerationError",
}  # fmt: skip


def load(what: str, remedy: str, function: Callable[[], T], *, local: bool = False) -> T:
    """The result of `function`, which reads from the hub, its cache or a local folder (`local`: the hub is not asked).

    Of local files every failure is a sentence: what stands in them decides which error a library ends with.
    `what` names the thing and its key ("model.path=roberta-base"), `remedy` what the user can do instead ("give
    model.path=DIR, a folder with a checkpoint"). ConfigError where the hub cannot be reached, does not have it or does not give it.
    """
    reached = not local and _hub_answers()
    try:
        with contextlib.nullcontext() if reached else _offline():
            return function()
    except ConfigError:
        raise
    except BaseException as error:
        reason = _reason(error, reached, local) if isinstance(error, Exception) or _is_panic(error) else None
        if reason is None:
            raise
        raise ConfigError(f"{what} cannot be loaded: {reason}; {remedy}") from error


def _hub_answers() -> bool:
    """Whether the hub gives any answer within `PROBE_SECONDS`; proxies, mirrors and offline mode are the client's settings."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # the client's errors are those of its HTTP library, which differs between versions
        return False
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """The hub's clients read only their cache; the earlier setting comes back at the end."""
    import datasets.config
    from huggingface_hub import constants

    places: tuple[Any, ...] = (constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust gave up on its input; such an error is no Exception."""
    return type(error).__name__ == "PanicException"


def _reason(error: BaseException, reached: bool, local: bool) -> str | None:
    """What went wrong, in words; None for an error that has nothing to do with files (a bug, no memory)."""
    from huggingface_hub import errors

    chain = list(_causes(error))
    if any(isinstance(e, errors.GatedRepoError) for e in chain) or "gated" in str(error):
        return "it is gated: accept its licence on the hub and set HF_TOKEN"
    names = {c.__name__ for e in chain for c in type(e).__mro__}
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError"}:
        return "the hub has nothing of that name, or it is private"
    if names & {"MemoryError", "OutOfMemoryError"} or "can't allocate memory" in str(error):
        return None
    of_files = isinstance(error, OSError | ValueError | EOFError) or names & _FILE_ERRORS
    if not (
        of_files or local or type(error) is Exception
    ):  # a plain Exception is how the tokenizers library refuses a file
        return None
    connection = {"ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "TransportError"}
    if not reached and names & connection:
        return "the hub cannot be reached from this machine, and there is no copy in its cache"
    if "trust_remote_code" in str(error):
        return "it wants to run code of its own, and foreign code is never run"
    if "UnpicklingError" in names:
        return "it is a damaged pickle, or one that holds more than weights, and such a pickle is never run"
    text = " ".join(str(error).split())
    if len(text) > SHOWN_CHARACTERS:
        whole, stop, _ = text[:SHOWN_CHARACTERS].rpartition(". ")
        text = whole if stop else f"{text[:SHOWN_CHARACTERS]}..."
    return f"{type(error).__name__}: {text.rstrip('.')}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
