"""Models on the Hugging Face Hub, named ``hf://USER/NAME`` or ``hf://USER/NAME@REVISION``, and their local files.

huggingface_hub downloads and caches them, and reads its environment variables: ``HF_TOKEN``, ``HF_HUB_CACHE``,
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


class HubModel(NamedTuple):
    """A repository on the Hub and a commit, branch or tag of it; None is its main branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubModel:
        """Parse ``USER/NAME``, optionally with ``hf://`` before it and ``@REVISION`` after it.

        Raises:
            UserError: the text has a different form.
        """
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        repository, at, revision = text.removeprefix(PREFIX).partition("@")
        form = f"{text!r} is not a repository on the Hub: give USER/NAME; to load, hf://USER/NAME or hf://USER/NAME@REVISION"
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise UserError(form) from error
        if repository.count("/") != 1 or bool(at) != bool(revision):
            raise UserError(form)
        return cls(repository, revision or None)

    @property
    def name(self) -> str:
        """Name of the repository without the user."""
        return self.repository.partition("/")[2]

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def on_hub(source: object) -> TypeGuard[str]:
    """Whether a source of weights or a model's name is on the Hub."""
    return isinstance(source, str) and source.startswith(PREFIX)


def local_file(source: str | Path) -> Path:
    """Return the local path of a source. Weights on the Hub are in the cache, and downloaded first if they are missing
    there, together with timm's ``config.json`` if the repository has one.

    Raises:
        UserError: the repository or the file in it does not exist, access is denied, or there is no connection.
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

    wanted = HubModel.parse(source)
    repository, revision = wanted
    with hub_errors(wanted):
        if not constants.HF_HUB_OFFLINE and try_to_load_from_cache(repository, WEIGHTS, revision=revision) is None:
            # fails at once without a connection; a download would retry for half a minute
            get_hf_file_metadata(hf_hub_url(repository, WEIGHTS, revision=revision))
        file = Path(hf_hub_download(repository, WEIGHTS, revision=revision))
        commit = file.parent.name  # snapshots/COMMIT/FILE
        if try_to_load_from_cache(repository, TIMM_CONFIG, revision=commit) is None:
            with suppress(RemoteEntryNotFoundError):  # a missing file is cached too
                hf_hub_download(repository, TIMM_CONFIG, revision=commit)
    return file


def pinned(source: str) -> str:
    """Return the source with its current commit as the revision."""
    return str(HubModel(HubModel.parse(source).repository, local_file(source).parent.name))


@contextmanager
def hub_errors(what: HubModel) -> Iterator[None]:
    """Turn any error of the Hub in the context into a UserError of one line.

    Raises:
        UserError: instead of the original error.
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
            f"{what}: the repository has no revision {what.revision}; give a branch, tag or commit"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise UserError(
            f"{what} is not in the cache ({constants.HF_HUB_CACHE}), and {why}: download it on a machine with a "
            f"connection (hf download {what.repository}), and give the path of its {WEIGHTS}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"{what} has no {WEIGHTS}; rome loads nothing else from the Hub, as a pickle (.bin, .pt) could run code"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            does = "has no permission for this" if status == 403 else "is not valid"
            raise UserError(f"{what}: the token {does}; use a different one ({login})") from error
        raise UserError(f"{what}: {constants.ENDPOINT} answered {status}: {first_line(error)}") from error
    except Exception as error:  # a connection can raise anything
        raise UserError(f"{what}: {first_line(error)} ({constants.ENDPOINT})") from error
