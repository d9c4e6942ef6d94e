"""Upload an export to the Hugging Face hub, or to a server that speaks like it (HF_ENDPOINT)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from orpo_lab.errors import UserError, one_line

# What the hub's client raises without an answer; its own errors are of this class too. The class is
# that of httpx or of httpx2, by the version of the client
Unanswered: type[Exception] = HfHubHTTPError.__bases__[0]
# What the hub itself puts into a new repository
OF_A_NEW_REPOSITORY = {".gitattributes"}


def check(name: str) -> None:
    """Check that the hub would take an export, before anything is computed.

    Raises:
        UserError: the hub cannot be reached, no token is known, or the repository holds files.
    """
    if constants.is_offline_mode():
        raise UserError(
            f"--push {name}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or leave "
            "--push out"
        )
    if get_token() is None:
        raise UserError(f"--push {name}: no token; log in with `hf auth login`, or set HF_TOKEN")
    with _said(name):
        api = HfApi()
        api.whoami()
        try:
            found = set(api.list_repo_files(name)) - OF_A_NEW_REPOSITORY
        except RepositoryNotFoundError:
            return
    if found:
        raise UserError(
            f"--push {name}: this repository holds files already ({sorted(found)[0]}), which would "
            "be mixed with the export's; give a new name"
        )


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder to a repository, which is made if there is none; return its address.

    Args:
        folder: of the export.
        name: org/name.
        private: whether a new repository is private.

    Raises:
        UserError: the hub cannot be reached, or refuses. The folder stays.
    """
    with _said(name):
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Upload an export of orpo_lab"
        )
    return str(commit.repo_url)


@contextmanager
def _said(name: str) -> Iterator[None]:
    """Inside this context, turn errors of the hub into a `UserError`, without any secret."""
    try:
        yield
    except (Unanswered, HFValidationError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"--push {name}: the hub did not take it ({one_line(error)[:200]}); check the name, "
            "the token's rights and the connection"
        ) from error
