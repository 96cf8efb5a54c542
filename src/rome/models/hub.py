"""Models on the Hugging Face Hub, named ``hf://USER/NAME`` or ``hf://USER/NAME@REVISION``, as files on this machine.

huggingface_hub downloads and caches them, and obeys its own variables: ``HF_TOKEN``, ``HF_HUB_CACHE``,
``HF_HUB_OFFLINE``, ``HF_ENDPOINT``. Only safetensors and timm's ``config.json`` are fetched, never a pickle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeGuard

from rome.core.errors import UserError, first_line

PREFIX = "hf://"
WEIGHTS, TIMM_CONFIG = "model.safetensors", "config.json"


class OnHub(NamedTuple):
    """A repository, and the commit, branch or tag of it; None is its main branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> OnHub:
        """What ``USER/NAME``, with or without ``hf://`` before it and ``@REVISION`` behind it, stands for.

        Raises:
            UserError: it has another form.
        """
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        repository, at, revision = text.removeprefix(PREFIX).partition("@")
        form = (
            f"{text!r} is no repository of the Hub: give USER/NAME; to load, hf://USER/NAME or hf://USER/NAME@REVISION"
        )
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise UserError(form) from error
        if repository.count("/") != 1 or bool(at) != bool(revision):
            raise UserError(form)
        return cls(repository, revision or None)

    @property
    def name(self) -> str:
        """Without the user."""
        return self.repository.partition("/")[2]

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def on_hub(source: object) -> TypeGuard[str]:
    """Whether a source of weights, or a model's name, is one of the Hub."""
    return isinstance(source, str) and source.startswith(PREFIX)


def local_file(source: str | Path) -> Path:
    """The path that a source stands for: of a model of the Hub that of its weights in the cache, downloaded first if
    they are not there. timm's ``config.json`` lies beside them where the repository has one.

    Raises:
        UserError: no such repository, no access to it, no such file in it, or no connection.
    """
    if not on_hub(source):
        return Path(source).expanduser()
    from huggingface_hub import (
        constants,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import RemoteEntryNotFoundError

    wanted = OnHub.parse(source)
    repository, revision = wanted
    with explained(wanted):
        if not constants.HF_HUB_OFFLINE and try_to_load_from_cache(repository, WEIGHTS, revision=revision) is None:
            # fails at once where there is no connection, which a download looks for half a minute
            get_hf_file_metadata(hf_hub_url(repository, WEIGHTS, revision=revision))
        file = Path(hf_hub_download(repository, WEIGHTS, revision=revision))
        commit = file.parent.name  # snapshots/COMMIT/FILE
        if try_to_load_from_cache(repository, TIMM_CONFIG, revision=commit) is None:
            with suppress(RemoteEntryNotFoundError):  # which is remembered, as a file is
                hf_hub_download(repository, TIMM_CONFIG, revision=commit)
    return file


def pinned(source: str) -> str:
    """The same source with the commit that it stands for now as its revision."""
    return str(OnHub(OnHub.parse(source).repository, local_file(source).parent.name))


@contextmanager
def explained(what: OnHub) -> Iterator[None]:
    """Inside, what goes wrong with the Hub ends in one line.

    Raises:
        UserError: instead of any other error.
    """
    from huggingface_hub import constants, errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            f"{what} is gated: ask for access at {constants.ENDPOINT}/{what.repository}, then {login}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{what}: there is no such repository at {constants.ENDPOINT}, or it is private: check the name, or {login}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{what}: the repository has no revision {what.revision}; name a branch, tag or commit"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise UserError(
            f"{what} is not in the cache ({constants.HF_HUB_CACHE}), and {why}: download it where there is a "
            f"connection (hf download {what.repository}), and name its {WEIGHTS}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"{what} has no {WEIGHTS}, and rome reads no other file of the Hub, as a pickle (.bin, .pt) could run code"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            does = "has no permission for this" if status == 403 else "is not valid"
            raise UserError(f"{what}: the token {does}; use another one ({login})") from error
        raise UserError(f"{what}: {constants.ENDPOINT} answered {status}: {first_line(error)}") from error
    except Exception as error:  # whatever a connection can raise
        raise UserError(f"{what}: {first_line(error)} ({constants.ENDPOINT})") from error
