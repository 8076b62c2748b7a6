"""The upload to a repository of the hub, by huggingface_hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx

from promptkd.errors import PromptKDError, RequestError
from promptkd.publish.bundle import Bundle

_KEPT = {".gitattributes"}  # the hub's own, in every repository
_REFUSED = {401: "the token is not valid", 403: "the token may not write there"}


def hub_token() -> str | None:
    """The token that uploads use: of HF_TOKEN, else of `hf auth login`."""
    return get_token()


def upload(bundle: Bundle, repository: str, *, private: bool, overwrite: bool) -> str:
    """Upload the bundle as one commit, to a new repository or, with `overwrite`, in place of what one holds.

    Returns the address. Raises `RequestError` for no token, a name, a token or a repository that does not do, and
    `PromptKDError` where the hub cannot be reached or fails.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=hub_token())
    if api.token is None:
        raise RequestError("Expected a token of the hub in HF_TOKEN, or a login by `hf auth login`. Got neither.")
    with _told(repository, api.endpoint):
        try:
            known = api.model_info(repository)
        except RepositoryNotFoundError:
            known = None
        held = [] if known is None else [each.rfilename for each in known.siblings or () if each.rfilename not in _KEPT]
        if held and not overwrite:
            some = ", ".join(held[:5])
            raise RequestError(f"{repository} exists and holds {some}. Replace it by --overwrite or give another name.")
        if known is not None and private and not known.private:
            raise RequestError(
                f"{repository} exists and is public. Make it private on the hub, or leave --private out."
            )
        if known is None:
            api.create_repo(repository, private=private)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in bundle.files.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=name) for name in held if name not in bundle.files]
        api.create_commit(repository, operations, commit_message="Upload by promptkd publish")
    return f"{api.endpoint}/{repository}"


@contextmanager
def _told(repository: str, endpoint: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors that name the repository and the reason."""
    try:
        yield
    except PromptKDError:
        raise
    except HFValidationError as error:
        raise RequestError(f"The repository must be named OWNER/NAME. Got {repository!r}: {error}") from error
    except OfflineModeIsEnabled as error:
        raise RequestError("HF_HUB_OFFLINE forbids the upload. Unset it, or look at it by --dry-run.") from error
    except LocalTokenNotFoundError as error:
        raise RequestError("Expected a token of the hub in HF_TOKEN, or a login by `hf auth login`.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = " ".join(str(error).split())[:400]
        if status in _REFUSED:
            owner = repository.split("/")[0]
            told = f"{endpoint} refused to write {repository}: {_REFUSED[status]}"
            raise RequestError(f"{told}. Give a token that may write to {owner}. It says: {reason}") from error
        raise PromptKDError(f"{endpoint} failed on {repository} with status {status}: {reason}") from error
    except (httpx.HTTPError, OSError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise PromptKDError(f"{endpoint} cannot be reached to write {repository}: {reason}") from error
    except Exception as error:  # the hub does not take the card, or hf_xet raises what it has
        raise PromptKDError(f"{endpoint} did not take {repository}: {' '.join(str(error).split())[:400]}") from error
