"""Model files from a local directory or a Hub repository, and a model directory to the Hub.

huggingface_hub is imported inside the functions: a model on the local disk does not wait for it.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

# The small model inside the package, in transformers' PyTorch layout.
EMBEDDED_NAME = "cifar10"
EMBEDDED_DIRECTORY = Path(__file__).parent / "embedded"

# A name that ends like this is a file that somebody mistyped, never a repository.
CHECKPOINT_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")

# The end of the name of the file that says which shard holds which tensor.
INDEX_SUFFIX = ".index.json"

# How many file names an error message lists.
LISTED_NAMES = 12

COMMIT_MESSAGE = "Upload LeViT model"


class HubError(OSError):
    """The Hub did not serve or take a model; the text is meant for the user."""


class HubUnreachableError(HubError):
    """The Hub gave no answer that says anything about the model."""


@dataclasses.dataclass(frozen=True)
class HubOptions:
    """How to access a Hub repository; no effect on local directories.

    Attributes:
        revision: branch, tag or commit hash of the repository; None for its main branch.
        token: access token; None for the one stored by `hf auth login` or in HF_TOKEN.
        cache_dir: directory for downloads; None for huggingface_hub's own cache.
        local_files_only: use the cache alone, as `HF_HUB_OFFLINE=1` does.
    """

    revision: str | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False


DEFAULTS = HubOptions()


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Where the files of a model lie on the local disk.

    Attributes:
        directory: holds the files.
        weights: the chosen weights, or the index of a sharded checkpoint; None where none were asked for.
        repo_id: the Hub repository; None for a local directory.
        revision: the commit hash of the files; None for a local directory.
    """

    directory: Path
    weights: Path | None
    repo_id: str | None
    revision: str | None


def resolve(
    source: str | Path,
    *,
    weights: Sequence[str] = (),
    files: Sequence[str] = (),
    options: HubOptions = DEFAULTS,
) -> Resolved:
    """Find the files of a model in a local directory, in the cache or on the Hub.

    A directory that exists wins over a repository of the same name. Of the weights only the first kind that the
    repository holds is downloaded, with its shards where it is an index. When the Hub cannot be reached, or in offline
    mode (`HF_HUB_OFFLINE=1`), the cache serves alone.

    Args:
        source: a directory, a Hub repository as "owner/name", or "cifar10", the small model inside the package.
        weights: names of weight files, the preferred one first; one of them must be there.
        files: names of other files, downloaded if present; one of them must be there if `weights` is empty.
        options: how to access the Hub.

    Raises:
        FileNotFoundError: `source` can only be a path and is not there, or the directory holds none of the files.
        NotADirectoryError: `source` is a file.
        HubError: the repository could not be had from the Hub or from the cache.
    """
    path = Path(source).expanduser()
    if source == EMBEDDED_NAME and not path.exists():
        path = EMBEDDED_DIRECTORY
    if path.is_dir():
        held = os.listdir(path)
        if _first(weights or files, held) is None:
            raise FileNotFoundError(f"{path} {_lack(weights or files, held)}")
        return _resolved(path, weights, None)
    if path.exists():
        raise NotADirectoryError(f"Expected a model directory or a Hub repository, found the file {path}.")
    if isinstance(source, Path) or not _is_repo_id(source):
        raise FileNotFoundError(
            f"There is no directory {path}, and it cannot be a Hub repository either: give an existing directory, or a"
            " repository as owner/name, such as facebook/levit-128S."
        )

    from huggingface_hub import constants

    cache = Path(options.cache_dir or constants.HF_HUB_CACHE).expanduser()
    request = _Request(source, tuple(weights), tuple(files), options.revision, options.token, cache)
    offline = options.local_files_only or constants.HF_HUB_OFFLINE
    return _resolved(request.from_cache() if offline else request.from_hub(), weights, source)


def push(
    directory: str | Path,
    repo_id: str,
    *,
    files: Sequence[str],
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str = COMMIT_MESSAGE,
) -> str:
    """Upload a model directory to the Hub, creating the repository where it does not exist.

    Args:
        directory: the model directory.
        repo_id: the repository as "owner/name"; without an owner it is the token's.
        files: names of the files to upload, those that are present; nothing else in `directory` leaves the machine.
        token: access token with the right to write; None for the one that `hf auth login` stored or HF_TOKEN holds.
        private: create the repository as a private one; without effect on one that exists.
        revision: the branch to upload to, which must exist; None for the main branch.
        commit_message: first line of the commit message.

    Returns:
        The address of the repository.

    Raises:
        FileNotFoundError: `directory` holds none of the files.
        HubError: the Hub did not take them.
    """
    directory = Path(directory).expanduser()
    present = [name for name in files if (directory / name).is_file()]
    if not present:
        raise FileNotFoundError(
            f"There is nothing to upload: {directory} {_lack(files, os.listdir(directory))}"
            if directory.is_dir()
            else f"There is nothing to upload: {directory} is not a directory."
        )
    api = _api(token)
    with _clear_errors(repo_id, revision):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=directory,
            allow_patterns=present,
            revision=revision,
            commit_message=commit_message,
        )
    return str(url)


def _is_repo_id(source: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return not source.endswith(CHECKPOINT_SUFFIXES)


def _first(names: Sequence[str], held: Collection[str]) -> str | None:
    return next((name for name in names if name in held), None)


def _resolved(directory: Path, weights: Sequence[str], repo_id: str | None) -> Resolved:
    name = _first(weights, os.listdir(directory))
    return Resolved(
        directory=directory,
        weights=None if name is None else directory / name,
        repo_id=repo_id,
        revision=None if repo_id is None else directory.name,
    )


def _lack(names: Sequence[str], held: Collection[str]) -> str:
    """Complete the sentence that begins with the place where none of `names` is."""
    listed = sorted(held)[:LISTED_NAMES]
    more = f" and {len(held) - len(listed)} more" if len(held) > len(listed) else ""
    wanted = " or ".join(names)
    return f"does not hold {wanted}; it holds {', '.join(listed) + more if listed else 'no files'}."


def _shards(index: Path) -> list[str]:
    """Return the names of the shards that the index of a sharded checkpoint points to."""
    try:
        return sorted({str(shard) for shard in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise HubError(f"{index} is not the index of a sharded checkpoint: expected a weight_map in it.") from error


@dataclasses.dataclass(frozen=True)
class _Request:
    """What is asked of one repository; its methods return a snapshot, a directory named by its commit hash."""

    repo_id: str
    weights: tuple[str, ...]
    files: tuple[str, ...]
    revision: str | None
    token: str | None = dataclasses.field(repr=False)
    cache: Path

    def from_hub(self) -> Path:
        """Return the snapshot as the Hub has it now, or as the cache has it where the Hub cannot be reached."""
        try:
            return self._download()
        except HubUnreachableError as error:
            snapshot = self._find_cached()
            if snapshot is None:
                raise HubUnreachableError(
                    f"{error} {self._not_cached}: check the network, or give a local directory with the model."
                ) from error
            logger.warning("%s Going on with %s from the cache, commit %s.", error, self.repo_id, snapshot.name)
            return snapshot

    def from_cache(self) -> Path:
        """Return the snapshot that the cache has, without asking the Hub."""
        snapshot = self._find_cached()
        if snapshot is None:
            raise HubError(
                f"{self._not_cached}, and offline mode is on: load it once without HF_HUB_OFFLINE and local_files_only,"
                " or give a local directory with the model."
            )
        return snapshot

    @property
    def _not_cached(self) -> str:
        revision = f" at revision {self.revision}" if self.revision else ""
        return f"The cache {self.cache} does not hold the whole of {self.repo_id}{revision}"

    def _find_cached(self) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        for name in self.weights or self.files:
            path = try_to_load_from_cache(self.repo_id, name, cache_dir=self.cache, revision=self.revision)
            if isinstance(path, str):
                found = Path(path)
                shards = _shards(found) if name.endswith(INDEX_SUFFIX) else []
                return found.parent if all((found.parent / shard).is_file() for shard in shards) else None
        return None

    def _download(self) -> Path:
        from huggingface_hub import constants

        api = _api(self.token)
        with _clear_errors(self.repo_id, self.revision):
            # Asked first because it has a timeout and no retries: without a network the answer comes at once.
            info = api.model_info(self.repo_id, revision=self.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            held = {sibling.rfilename for sibling in info.siblings or ()}
            if _first(self.weights or self.files, held) is None:
                raise HubError(f"The Hub repository {self.repo_id} {_lack(self.weights or self.files, held)}")
            chosen = _first(self.weights, held)
            wanted = [name for name in (*self.files, chosen) if name in held]
            download = functools.partial(api.snapshot_download, self.repo_id, cache_dir=self.cache)
            snapshot = Path(download(revision=self.revision, allow_patterns=wanted))
            if chosen is not None and chosen.endswith(INDEX_SUFFIX):
                download(revision=snapshot.name, allow_patterns=_shards(snapshot / chosen))
        return snapshot


def _api(token: str | None) -> "HfApi":
    from huggingface_hub import HfApi

    # Anything else fails deep in the HTTP library, with the token in the message.
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise HubError("The token is empty or holds a character that no access token has, such as white space.")
    return HfApi(token=token)


@contextlib.contextmanager
def _clear_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError that says what to do next."""
    from huggingface_hub import constants, errors

    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError as error:
        raise HubError(
            f"The Hub repository {repo_id} is gated: ask for access at {constants.ENDPOINT}/{repo_id}, then log in with"
            " `hf auth login`, set HF_TOKEN or pass a token."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id} is neither a local directory nor a model on the Hub that this token may see: check the name, or"
            " log in with `hf auth login` if the repository is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"The Hub repository {repo_id} has no revision {revision}: give a branch, a tag or a commit hash of it."
        ) from error
    # Transport errors are OSError up to huggingface_hub 0.36 and HTTPError of its HTTP library from 1.0 on, hf_xet
    # reports a failed transfer as RuntimeError, and the login page of a public network is not JSON.
    except (OSError, errors.HTTPError, RuntimeError, json.JSONDecodeError) as error:
        raise _explain(error, repo_id) from error


def _explain(error: Exception, repo_id: str) -> HubError:
    from huggingface_hub import constants, errors

    # Up to 0.36 a file that is missing from the cache is an HfHubHTTPError too, one without a response.
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        answer = f"HTTP {status}" + (f", {error.server_message}" if error.server_message else "")
        if status in (401, 403):
            return HubError(
                f"The Hub refused access to {repo_id} ({answer}): log in with `hf auth login`, set HF_TOKEN or pass a"
                " token that has the right to do this."
            )
        if status == 429 or status >= 500:
            return HubUnreachableError(f"The Hub at {constants.ENDPOINT} does not serve requests now ({answer}).")
        return HubError(f"The Hub at {constants.ENDPOINT} did not accept the request for {repo_id} ({answer}).")

    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, OSError) and error.errno is not None:
        return HubError(
            f"The files of {repo_id} could not be read or written here ({reason}): check the free space and the"
            " permissions, or choose another cache with cache_dir or HF_HOME."
        )
    return HubUnreachableError(f"The connection to the Hub at {constants.ENDPOINT} failed ({reason}).")
