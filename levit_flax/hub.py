"""Find model files on the local disk or the Hub, and upload model directories.

huggingface_hub is imported inside the functions, because loading from the local disk does not need it.
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

from .choices import _suggest
from .files import _check_regular, _read_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_logger = logging.getLogger(__name__)

# The small model inside the package, in transformers' PyTorch layout.
_EMBEDDED_NAME = "cifar10"
_EMBEDDED_DIRECTORY = Path(__file__).parent / "embedded"

# The published models by the names that the paper and timm use.
_PUBLISHED = {name: f"facebook/{name}" for name in ("levit-128S", "levit-128", "levit-192", "levit-256", "levit-384")}

_SHORT_NAMES = (_EMBEDDED_NAME, *_PUBLISHED)

# Prefixes of timm: the first two for the Hub, the last for a directory.
_HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_DIRECTORY_PREFIX = "local-dir:"

# A missing source with one of these suffixes is a mistyped file name, not a repository.
_CHECKPOINT_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")

# The suffix of the index of a sharded checkpoint, which maps tensors to shards.
_INDEX_SUFFIX = ".index.json"

_LISTED_NAMES = 12  # maximum number of file names in an error message


class HubError(OSError):
    """Raised when a model cannot be downloaded from or uploaded to the Hub.

    Examples:
        >>> from levit_flax import from_pretrained
        >>> try:
        ...     from_pretrained("someone/levit", cache_dir="empty", local_files_only=True)
        ... except HubError as error:
        ...     print(str(error).partition(",")[0])
        The cache empty does not have all files of someone/levit
    """


class HubUnreachableError(HubError):
    """Raised when the Hub cannot be reached or is unavailable.

    Examples:
        >>> issubclass(HubUnreachableError, HubError) and issubclass(HubError, OSError)
        True
    """


@dataclasses.dataclass(frozen=True)
class _HubOptions:
    """Options for access to a Hub repository; except for the last, they do not affect local directories.

    Attributes:
        revision: branch, tag or commit hash of the repository; None for its main branch.
        token: access token; None for the one stored by `hf auth login` or in HF_TOKEN.
        cache_dir: directory for downloads; None for huggingface_hub's own cache.
        local_files_only: use only the cache, as `HF_HUB_OFFLINE=1` does.
        subfolder: folder of the repository that contains the files; also used for local directories.
    """

    revision: str | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    subfolder: str = ""


_DEFAULTS = _HubOptions()


@dataclasses.dataclass(frozen=True)
class _Resolved:
    """The files of a model on the local disk.

    Attributes:
        directory: the directory with the files.
        weights: the weight file, or the index of a sharded checkpoint; None if no weights were requested.
        repo_id: the Hub repository; None for a local directory.
        revision: the commit hash of the files; None for a local directory.
    """

    directory: Path
    weights: Path | None
    repo_id: str | None
    revision: str | None


def _resolve(
    source: str | Path,
    *,
    weights: Sequence[str] = (),
    files: Sequence[str] = (),
    options: _HubOptions = _DEFAULTS,
) -> _Resolved:
    """Find the files of a model in a local directory, in the cache or on the Hub.

    An existing directory takes precedence over a repository with the same name. Only the first of `weights` that the
    repository has is downloaded, or its only file that may contain weights; if it is an index, so are its shards. If
    the Hub cannot be reached, or in offline mode (`HF_HUB_OFFLINE=1`), files are loaded from the cache.

    Args:
        source: a directory, a Hub repository as "owner/name", "cifar10", the small model in the package, or the name of
            a published model. timm's prefixes are removed.
        weights: names of weight files in order of preference, of which at least one must exist.
        files: names of other files, downloaded if they exist. If `weights` is empty, at least one must exist.
        options: how to access the Hub.
    """
    source, path = _locate(source)
    if path.is_dir():
        path /= options.subfolder
        present = os.listdir(path) if path.is_dir() else []
        if _choose(weights or files, present, bool(weights)) is None:
            raise FileNotFoundError(f"{path} is not a model directory: {_expected(weights or files, present)}")
        return _resolved(path, weights, None)
    meant = _suggest(str(source), _SHORT_NAMES)
    if meant and str(source).lower() in map(str.lower, _SHORT_NAMES):  # only the case differs
        raise FileNotFoundError(f"There is no model {source}.{meant}")
    if os.path.lexists(path):
        _check_regular(path)
        raise NotADirectoryError(f"The model {path} is a file: expected a model directory or a Hub repository.")
    if isinstance(source, Path) or not _is_repo_id(source):
        raise FileNotFoundError(
            f"The model {path} does not exist: expected a directory, or a Hub repository as owner/name, such as"
            f" facebook/levit-128S.{meant}"
        )

    from huggingface_hub import constants

    cache = Path(options.cache_dir or constants.HF_HUB_CACHE).expanduser()
    inside = f"{options.subfolder.strip('/')}/" if options.subfolder else ""
    wanted, others = (tuple(inside + name for name in names) for names in (weights, files))
    request = _Request(source, wanted, others, options.revision, options.token, cache)
    offline = options.local_files_only or constants.HF_HUB_OFFLINE
    snapshot = request.from_cache() if offline else request.from_hub()
    return _resolved(snapshot / inside, weights, source, snapshot.name)


def _locate(source: str | Path) -> tuple[str | Path, Path]:
    """Return the source without prefixes and short names, and the local path that it may mean."""
    if isinstance(source, str):
        for prefix in _HUB_PREFIXES:
            source = source.removeprefix(prefix)
        if source.startswith(_DIRECTORY_PREFIX):
            source = Path(source.removeprefix(_DIRECTORY_PREFIX))
    elif not isinstance(source, os.PathLike):
        raise TypeError(f"The source of a model must be a str or a path, found {type(source).__name__}.")
    path = Path(source).expanduser()
    if isinstance(source, str) and not path.exists():
        if source == _EMBEDDED_NAME:
            path = _EMBEDDED_DIRECTORY
        source = _PUBLISHED.get(source, source)
    return source, path


def _push(
    directory: str | Path,
    repo_id: str,
    *,
    files: Sequence[str],
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload those of `files` that exist in a directory, and return the URL of the repository.

    The repository is created if it does not exist; the other arguments are those of `push_to_hub`.
    """
    directory = Path(directory).expanduser()
    present = [name for name in files if (directory / name).is_file()]
    if not present:
        raise FileNotFoundError(
            f"{directory} has no files to upload: {_expected(files, os.listdir(directory))}"
            if directory.is_dir()
            else f"{directory} has no files to upload: expected a directory."
        )
    api = _api(token)
    with _explain_errors(repo_id, revision):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=directory,
            allow_patterns=present,
            revision=revision,
            commit_message="Upload LeViT model" if commit_message is None else commit_message,
        )
    return str(url)


def _is_repo_id(source: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return not source.endswith(_CHECKPOINT_SUFFIXES)


def _first(names: Sequence[str], present: Collection[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _choose(names: Sequence[str], present: Collection[str], other_weights: bool) -> str | None:
    """Return the first of `names` that is present; if none is, the only other file with weights, if that is wanted."""
    found = _first(names, present)
    if found is None and other_weights:
        others = [name for name in present if name.endswith(_CHECKPOINT_SUFFIXES)]
        return others[0] if len(others) == 1 else None
    return found


def _resolved(directory: Path, weights: Sequence[str], repo_id: str | None, revision: str | None = None) -> _Resolved:
    name = _choose(weights, os.listdir(directory), bool(weights))
    return _Resolved(
        directory=directory,
        weights=None if name is None else directory / name,
        repo_id=repo_id,
        revision=revision,
    )


def _expected(names: Sequence[str], present: Collection[str]) -> str:
    """Return the end of an error message: the file names expected, one of which is enough, and those found."""
    listed = sorted(present)[:_LISTED_NAMES]
    more = f" and {len(present) - len(listed)} more" if len(present) > len(listed) else ""
    wanted = " or ".join(names)
    return f"expected {wanted}, found {', '.join(listed) + more if listed else 'no files'}."


def _shards(index: Path) -> list[str]:
    """Return the names of the shards that the index of a sharded checkpoint points to."""
    try:
        return sorted({str(shard) for shard in _read_json(index)["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise HubError(f"{index} is not the index of a sharded checkpoint: expected JSON with a weight_map.") from error


@dataclasses.dataclass(frozen=True)
class _Request:
    """A request for files of a repository. Its methods return a snapshot, a directory named by its commit hash."""

    repo_id: str
    weights: tuple[str, ...]
    files: tuple[str, ...]
    revision: str | None
    token: str | None = dataclasses.field(repr=False)
    cache: Path

    def from_hub(self) -> Path:
        """Return the current snapshot of the Hub, or the cached one if the Hub cannot be reached."""
        try:
            return self._download()
        except HubUnreachableError as error:
            snapshot = self._find_cached()
            if snapshot is None:
                raise HubUnreachableError(
                    f"{error} {self._not_cached}. Check the network, or pass a local model directory or"
                    f" {_EMBEDDED_NAME}, the small model in the package."
                ) from error
            _logger.warning("%s Loading %s from the cache, commit %s.", error, self.repo_id, snapshot.name)
            return snapshot

    def from_cache(self) -> Path:
        """Return the cached snapshot without accessing the Hub."""
        snapshot = self._find_cached()
        if snapshot is None:
            raise HubError(
                f"{self._not_cached}, and offline mode is on. Load it once without HF_HUB_OFFLINE and"
                f" local_files_only=True, or pass a local model directory or {_EMBEDDED_NAME}, the small model in the"
                " package."
            )
        return snapshot

    @property
    def _not_cached(self) -> str:
        revision = f" at revision {self.revision}" if self.revision else ""
        return f"The cache {self.cache} does not have all files of {self.repo_id}{revision}"

    def _find_cached(self) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        for name in self.weights or self.files:
            path = try_to_load_from_cache(self.repo_id, name, cache_dir=self.cache, revision=self.revision)
            if isinstance(path, str):
                file = Path(path)
                shards = _shards(file) if name.endswith(_INDEX_SUFFIX) else []
                snapshot = file.parents[name.count("/")]
                return snapshot if all((file.parent / shard).is_file() for shard in shards) else None
        return None

    def _download(self) -> Path:
        from huggingface_hub import constants

        api = _api(self.token)
        with _explain_errors(self.repo_id, self.revision):
            # Called first, because it has a timeout and no retries, so that it fails quickly without a network.
            info = api.model_info(self.repo_id, revision=self.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            present = {sibling.rfilename for sibling in info.siblings or ()}
            here = {name for name in present if name.count("/") == (self.weights or self.files)[0].count("/")}
            if _choose(self.weights or self.files, here, bool(self.weights)) is None:
                expected = _expected(self.weights or self.files, present)
                raise HubError(f"The Hub repository {self.repo_id} has no LeViT model: {expected}")
            chosen = _choose(self.weights, here, bool(self.weights))
            names = [name for name in (*self.files, chosen) if name in present]
            download = functools.partial(api.snapshot_download, self.repo_id, cache_dir=self.cache)
            snapshot = Path(download(revision=self.revision, allow_patterns=names))
            if chosen is not None and chosen.endswith(_INDEX_SUFFIX):
                folder = chosen.rpartition("/")[0]
                shards = [f"{folder}/{name}".lstrip("/") for name in _shards(snapshot / chosen)]
                download(revision=snapshot.name, allow_patterns=shards)
        return snapshot


def _api(token: str | None) -> "HfApi":
    from huggingface_hub import HfApi

    # Other characters make the HTTP library raise an error that shows the token.
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise HubError("The token is invalid: expected printable ASCII characters without spaces.")
    return HfApi(token=token)


@contextlib.contextmanager
def _explain_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Convert the errors of huggingface_hub to a HubError that advises what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError as error:
        raise HubError(
            f"The Hub repository {repo_id} is gated. Request access at {constants.ENDPOINT}/{repo_id}, then log in with"
            " `hf auth login`, set HF_TOKEN or pass a token."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id} is neither a local directory nor a Hub repository that you can access. Check the name, or log"
            " in with `hf auth login` if the repository is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"The Hub repository {repo_id} has no revision {revision}: expected a branch, a tag or a commit hash."
        ) from error
    # HTTPError: transport. RuntimeError: a failed transfer of hf_xet. JSONDecodeError: the login page of a network.
    except (OSError, errors.HTTPError, RuntimeError, json.JSONDecodeError) as error:
        raise _explain(error, repo_id) from error


def _explain(error: Exception, repo_id: str) -> HubError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        answer = f"HTTP {status}" + (f", {error.server_message}" if error.server_message else "")
        if status in (401, 403):
            return HubError(
                f"The Hub refused access to {repo_id} ({answer}). Log in with `hf auth login`, set HF_TOKEN or pass a"
                " token with the required permission."
            )
        if status == 429 or status >= 500:
            return HubUnreachableError(f"The Hub at {constants.ENDPOINT} is unavailable ({answer}).")
        return HubError(f"The Hub at {constants.ENDPOINT} rejected the request for {repo_id} ({answer}).")

    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, OSError) and error.errno is not None:
        return HubError(
            f"The files of {repo_id} could not be read or written on this machine ({reason}). Check free space and"
            " permissions, or choose another cache with cache_dir or HF_HOME."
        )
    return HubUnreachableError(f"The connection to the Hub at {constants.ENDPOINT} failed ({reason}).")
