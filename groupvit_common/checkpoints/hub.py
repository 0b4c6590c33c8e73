"""The hub: "org/name" or a path -> a local directory, and a local directory -> the hub.

Requests: one HEAD request to learn the commit of a branch (none for a full commit hash); files of that commit that the
cache has, or knows to be absent, cost nothing more. Offline (`HF_HUB_OFFLINE=1` or `local_files_only=True`) there are
no requests. A host that cannot be reached is not tried twice: the cached copy is used, or the error comes at once. The
cache is huggingface_hub's own, shared with transformers.

huggingface_hub's `snapshot_download` would list the whole repository first, and selects files by patterns where an
index must say which shards belong together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self

from groupvit_common.checkpoints.directory import (
    CONFIG_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    is_weights_file,
    missing_files,
    read_index,
)
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.storage.names import list_files
from groupvit_common.storage.saving import has_file, settle, write_file, write_text

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


DEMO = "demo"
DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
"""The bundled model, trained on synthetic scenes: called "demo" wherever a checkpoint is named."""

# The account that converts pickled checkpoints on the hub, and the cache's name for the commit of such a conversion.
_CONVERSION_BOT = "SFconvertbot"
_CONVERSION_REF = "groupvit-conversion"


@dataclass(frozen=True, kw_only=True)
class HubLocation:
    """Keywords of every `from_pretrained` that say where files are found beside the checkpoint's name.

    revision: branch, tag, pull request ("refs/pr/1") or commit; if None the default branch or, where that has pickled
        weights only, the open pull request of the hub's conversion bot. Unused for a directory.
    token: access token; None or True: the one that `hf auth login` stored; False: none.
    cache_dir: folder of downloads instead of huggingface_hub's cache.
    subfolder: a folder inside the checkpoint.
    local_files_only: use the cache, without the network.
    force_download: download again even if cached, e.g. after a damaged download.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    subfolder: str = ""
    local_files_only: bool = False
    force_download: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "revision", self.revision or None)
        object.__setattr__(self, "cache_dir", None if self.cache_dir is None else str(self.cache_dir))
        object.__setattr__(self, "subfolder", self.subfolder.strip("/"))

    @classmethod
    def take(cls, keywords: dict[str, Any]) -> Self:
        """Takes the keywords of a location out of a function's others; `use_auth_token` is the former name of
        `token`."""
        former = keywords.pop("use_auth_token", None)
        if former is not None:
            if keywords.get("token") is not None:
                raise InputError("token and use_auth_token are the same; pass token= alone")
            keywords["token"] = former
        return cls(**{name: keywords.pop(name) for name in HUB_KEYWORDS if name in keywords})


HUB_KEYWORDS = tuple(field.name for field in fields(HubLocation))


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    patterns: Sequence[str],
    required: Sequence[str] = (),
    location: HubLocation = HubLocation(),
) -> Path:
    """Returns the local directory with those of the files `patterns` that a checkpoint has.

    Args:
        name_or_path: "demo", the bundled model, whatever folders there are ("./demo" is a folder of that name); else a
            directory, which wins, or "org/name" on the hub.
        patterns: file names, no wildcards. `model.safetensors` also stands for the shards that take its place; other
            weight formats are never downloaded.
        required: those of them that must be there; at least one of `patterns` always must.
        location: the revision, cache and so on.

    Returns:
        The directory, `subfolder` included.

    Raises:
        CheckpointError: no such directory or repository, no access, no such revision or file, no network. One sentence
            says which, and what to do; the cause is chained.
        InputError: an argument of the wrong type.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise InputError(f"expected a directory or a name such as 'org/name', got {type(name_or_path).__name__}")
    name = os.fspath(name_or_path)
    if not isinstance(name, str):
        raise InputError(f"expected a directory or a name such as 'org/name', got the bytes {name[:80]!r}")
    directory = local(name)
    if directory is not None:
        return _in_directory(directory / location.subfolder, patterns, required)
    _refuse_path(name, _path(name))
    repository = _Repository(name, location)
    repository.check()
    return _snapshot(repository, patterns, required)


def bundled(name: str | os.PathLike[str]) -> Path | None:
    """Returns the directory of the bundled model if that is meant."""
    return DEMO_MODEL if os.fspath(name) == DEMO else None


def local(name: str | os.PathLike[str]) -> Path | None:
    """Returns the directory that a name means, None for one on the hub."""
    directory = bundled(name) or _path(name)
    # A name that is too long for a path is none, says `os.path`.
    return directory if os.fspath(name) and os.path.isdir(directory) else None  # noqa: PTH112


def _path(name: str | os.PathLike[str]) -> Path:
    """Returns the path of a name, with the home that `~` or `~user` stands for if there is one."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - the method raises RuntimeError then


def list_repository(name: str, *, revision: str | None = None, token: str | bool | None = None) -> list[str]:
    """Returns the files of "org/name" on the hub, sorted; offline, or without a network, those in the cache.

    Raises:
        CheckpointError: as `resolve`.
    """
    from huggingface_hub import HfApi, snapshot_download

    _refuse_path(name, _path(name))
    repository = _Repository(name, HubLocation(revision=revision, token=token))
    repository.check()
    try:
        # One request without retries: a host that cannot be reached is not tried again and again.
        repository.commit(CONFIG_NAME)
        return sorted(HfApi(token=token).list_repo_files(name, revision=revision))
    except _failures() as error:
        try:
            snapshot = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except _failures():
            raise _explain(error, repository) from error
        return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())


def _in_directory(directory: Path, patterns: Sequence[str], required: Sequence[str]) -> Path:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: the checkpoint has no such subfolder")
    try:
        settle(directory)
    except CheckpointError:
        raise
    except OSError:
        # Without the right to finish a save: whoever opens the files reads through it.
        pass
    present = [name for name in patterns if has_file(directory, name)]
    if WEIGHTS_NAME in patterns and has_file(directory, WEIGHTS_INDEX_NAME):
        present.append(WEIGHTS_NAME)
    _demand(directory, patterns, required, present, lambda: list_files(directory))
    return directory


def _demand(
    where: object,
    patterns: Sequence[str],
    required: Sequence[str],
    found: Sequence[str],
    listing: Callable[[], list[str]],
) -> None:
    """Raises `CheckpointError` unless everything required, and at least something, was found."""
    missing = [name for name in required if name not in found]
    if missing:
        raise missing_files(where, missing, listing(), every=True)
    if not found:
        raise missing_files(where, patterns, listing())


def _refuse_path(name: str, path: Path) -> None:
    """Raises `CheckpointError` for what can only be meant as a path: it does not exist, or is a file."""
    if os.path.isfile(path):  # noqa: PTH113 - a name that is too long for a path is none
        raise CheckpointError(f"{name} is a file; expected the directory that holds the checkpoint, or 'org/name'")
    if not name or name.startswith((".", "~", os.sep)) or "\\" in name or path.is_absolute() or name.count("/") > 1:
        raise CheckpointError(f"there is no directory {name!r}")
    if "/" not in name:
        raise CheckpointError(
            f"there is no directory {name!r}; expected an existing directory, or a model on the hub as 'org/name'"
        )


# -- the hub: huggingface_hub is imported where it is used, `groupvit --help` must not wait for it --


@dataclass(frozen=True)
class _Repository:
    """A repository on the hub."""

    name: str
    location: HubLocation

    def check(self) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HFValidationError

        try:
            hf_hub_url(self.name, CONFIG_NAME)
        except HFValidationError as error:
            raise CheckpointError(
                f"{self.name!r} is neither a directory nor a possible name on the hub, which is 'org/name' of letters, "
                "digits, '-', '_' and '.'"
            ) from error

    def path(self, name: str) -> str:
        return f"{self.location.subfolder}/{name}" if self.location.subfolder else name

    def commit(self, name: str) -> str:
        """Returns the commit of the revision, by one HEAD request without retries for a file, which need not exist."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            commit = get_hf_file_metadata(
                hf_hub_url(self.name, self.path(name), revision=self.location.revision), self.location.token
            ).commit_hash
        except RemoteEntryNotFoundError as error:
            commit = error.response.headers.get("X-Repo-Commit")
        # A server without that header is asked file by file.
        return commit or self.location.revision or "main"

    def cached(self, name: str, revision: str | None) -> Path | bool | None:
        """Returns the path of a file in the cache, False if it is known not to exist, None if nothing is known."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, self.path(name), cache_dir=self.location.cache_dir, revision=revision)
        return Path(found) if isinstance(found, str) else (None if found is None else False)

    def download(self, name: str, revision: str | None) -> Path | None:
        """Returns the file, downloaded if the cache does not have it, or None if the repository does not."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        known = None if self.location.force_download else self.cached(name, revision)
        if isinstance(known, Path):
            return known
        if known is False:
            return None
        try:
            return Path(
                hf_hub_download(
                    self.name,
                    self.path(name),
                    revision=revision,
                    token=self.location.token,
                    cache_dir=self.location.cache_dir,
                    force_download=self.location.force_download,
                )
            )
        except RemoteEntryNotFoundError:
            return None

    def remember(self, name: str, path: Path) -> None:
        """Lets the cache know that the revision stands at the commit of `path`, for a later use offline."""
        from huggingface_hub import hf_hub_download

        if self.cached(name, self.location.revision) != path:
            hf_hub_download(
                self.name,
                self.path(name),
                revision=self.location.revision,
                token=self.location.token,
                cache_dir=self.location.cache_dir,
            )

    def conversion(self, offline: bool) -> str | None:
        """Returns the revision at which the hub's own bot offers a pickled checkpoint as safetensors, if it does.

        Many old checkpoints have their weights as a pickle on the default branch and as safetensors in an open pull
        request of that bot, where transformers too looks for them.
        """
        from huggingface_hub import HfApi

        if offline:
            return _CONVERSION_REF if self._ref(_CONVERSION_REF).is_file() else None
        try:
            requests = HfApi(token=self.location.token).get_repo_discussions(
                self.name, author=_CONVERSION_BOT, discussion_type="pull_request", discussion_status="open"
            )
            return next((request.git_reference for request in requests if request.git_reference), None)
        except _failures():
            return None

    def remember_conversion(self, directory: Path) -> None:
        """Lets the cache know that `conversion` led to the snapshot `directory`, for a later use offline."""
        snapshot = (
            directory.parents[len(PurePosixPath(self.location.subfolder).parts) - 1]
            if self.location.subfolder
            else directory
        )
        try:
            write_file(self._ref(_CONVERSION_REF), partial(write_text, text=snapshot.name))
        except OSError:
            # A cache that cannot be written costs the next use a few requests, no more.
            return

    def _ref(self, name: str) -> Path:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        cache = Path(self.location.cache_dir or constants.HF_HUB_CACHE)
        return cache / repo_folder_name(repo_id=self.name, repo_type="model") / "refs" / name

    def files(self, revision: str | None) -> list[str]:
        """Returns the files of the repository, for an error message; none if the hub does not list them."""
        from huggingface_hub import HfApi

        try:
            siblings = HfApi(token=self.location.token).model_info(self.name, revision=revision).siblings or []
        except _failures():
            return []
        start = self.path("")
        return [file.rfilename[len(start) :] for file in siblings if file.rfilename.startswith(start)]

    def __str__(self) -> str:
        folder = f", folder {self.location.subfolder!r}" if self.location.subfolder else ""
        return f"{self.name!r} on the hub{folder}" + (
            f" (revision {self.location.revision!r})" if self.location.revision else ""
        )


def _snapshot(repository: _Repository, patterns: Sequence[str], required: Sequence[str]) -> Path:
    from huggingface_hub.errors import RevisionNotFoundError

    local_files_only = repository.location.local_files_only
    unreachable: BaseException | None = None
    commit = repository.location.revision
    # A commit does not move: if the cache knows all its files there is nothing to ask.
    settled = _is_commit(commit) and all(repository.cached(name, commit) is not None for name in patterns)
    if not local_files_only and not settled:
        try:
            commit = repository.commit(patterns[0])
        except RevisionNotFoundError as error:
            raise _explain(error, repository) from error
        except _failures() as error:
            # No network, no access, or a hub out of order: a complete cached copy is as good.
            unreachable = error
    offline = local_files_only or unreachable is not None or _offline_mode()

    def get(name: str) -> Path | None:
        if offline:
            known = repository.cached(name, repository.location.revision)
            return known if isinstance(known, Path) else None
        return repository.download(name, commit)

    try:
        found = {name: path for name in patterns if (path := get(name)) is not None}
        shards: list[str] = []
        if WEIGHTS_NAME in patterns and WEIGHTS_NAME not in found and (index := get(WEIGHTS_INDEX_NAME)) is not None:
            shards = sorted(set(read_index(index).values()))
            absent = [shard for shard in shards if get(shard) is None]
            if absent and not offline:
                raise CheckpointError(f"{repository} lacks {absent[0]}, which its {WEIGHTS_INDEX_NAME} names")
            if not absent:
                found[WEIGHTS_NAME] = index
        if found and not offline and not _is_commit(repository.location.revision):
            # The index stands for the weights that it names.
            name, path = next(iter(found.items()))
            repository.remember(path.name if name == WEIGHTS_NAME else name, path)
    except CheckpointError:
        raise
    except _failures() as error:
        raise _explain(error, repository) from error

    if WEIGHTS_NAME in patterns and WEIGHTS_NAME not in found and repository.location.revision is None:
        converted = repository.conversion(offline)
        if converted is not None:
            location = replace(repository.location, revision=converted)
            directory = _snapshot(_Repository(repository.name, location), patterns, required)
            if not offline:
                repository.remember_conversion(directory)
            return directory

    if offline and (not found or not set(required) <= set(found)):
        if unreachable is not None:
            raise _explain(unreachable, repository) from unreachable
        absent = [name for name in required or patterns if name not in found]
        raise CheckpointError(
            f"{repository} is not in the local cache ({', '.join(absent)}), and downloads are off "
            f"({'local_files_only=True' if local_files_only else 'HF_HUB_OFFLINE'}): allow them once, or give a "
            "directory"
        )
    try:
        _demand(repository, patterns, required, list(found), lambda: repository.files(commit))
    except CheckpointError as error:
        if WEIGHTS_NAME in (required or patterns) and WEIGHTS_NAME not in found:
            message = f"{error}. Another branch or pull request may hold safetensors: pass revision='refs/pr/NUMBER'"
            raise CheckpointError(message) from error
        raise
    name, path = next(iter(found.items()))
    return path.parents[len(PurePosixPath(name).parts) - 1]


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


def _offline_mode() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _http_error() -> type[BaseException]:
    """Returns the base of all errors of the HTTP client: httpx's in huggingface_hub 1, httpx2's in 2."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _failures() -> tuple[type[BaseException], ...]:
    """Returns the classes of errors that huggingface_hub raises for causes outside this program (its Xet downloader:
    RuntimeError)."""
    return (_http_error(), OSError, ValueError, RuntimeError)


def _explain(error: BaseException, repository: _Repository) -> CheckpointError:
    """Returns the error that tells the user of a failure of huggingface_hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, page = repository.name, f"{constants.ENDPOINT}/{repository.name}"
    # huggingface_hub wraps what it met in an error of its own once its retries are used up.
    cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    if isinstance(cause, OfflineModeIsEnabled):
        text = (
            f"{repository} is not in the local cache, and downloads are off (HF_HUB_OFFLINE): "
            "allow them once, or give a directory"
        )
    elif isinstance(cause, GatedRepoError):
        text = (
            f"{name!r} is gated: accept its conditions at {page} and pass a token of that account "
            "(token=..., or `hf auth login`)"
        )
    elif isinstance(cause, RepositoryNotFoundError):
        text = (
            f"there is no directory {name!r} and no repository of that name at {page}, or it is private: check the "
            "name; "
            "a private one needs a token (token=..., or `hf auth login`)"
        )
    elif isinstance(cause, RevisionNotFoundError):
        text = (
            f"{name!r} has no revision {repository.location.revision!r}: see its branches and tags at {page}/tree/main"
        )
    elif isinstance(cause, HfHubHTTPError):
        text = _status(cause, name, page)
    elif isinstance(error, (_http_error(), FileNotFoundError)):
        text = (
            f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error}), and {repository} is not "
            "complete "
            "in the local cache: check the connection, or give a directory"
        )
    else:
        text = f"{repository} cannot be downloaded: {error}"
    return CheckpointError(" ".join(text.split()))


def _status(error: HfHubHTTPError, name: str, page: str) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"access to {page} was refused (HTTP {status}): the token is not valid, or lacks the right that is needed"
        )
    if status == 429:
        return f"{page}: too many requests (HTTP 429): wait a while, or pass a token"
    return f"the hub could not deliver {name!r} (HTTP {status} from {page}): try again later"


# -- sending --


def push(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
    revision: str | None = None,
    create_pr: bool = False,
    folders: bool = False,
    use_auth_token: str | bool | None = None,
) -> str:
    """Sends the files of `directory` to a model repository on the hub, in one commit.

    The repository is made if need be.

    If weights are among them, other weight files of the same format in the repository (old shards, an old index) are
    removed in the same commit, so that it holds one model.

    Args:
        repo_id: "org/name", or "name" for the token's own account.
        private: whether a new repository is private; None: the account's default.
        revision: branch, made if need be; the default branch if None.
        create_pr: open a pull request instead of committing.
        folders: also send the files in the folders of `directory`.
        use_auth_token: the former name of `token`.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        CheckpointError: no such directory, no access, no network.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    token = use_auth_token if token is None else token
    folder = Path(directory)
    # Hidden files are temporary ones or Git's.
    names = [name for name in list_files(folder, folders) if not name.startswith(".") and "/." not in name]
    if not names:
        raise CheckpointError(f"there is nothing to send in {folder}: no such directory, or no files in it")
    location = HubLocation(revision=revision, token=token)
    _Repository(repo_id, location).check()
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        stale: list[str] = []
        if any(is_weights_file(name) for name in names):
            there = api.list_repo_files(repo_id, revision=revision)
            stale = [name for name in there if is_weights_file(name) and name not in names]
        # Not `upload_folder`, which may spread a folder over several commits.
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, folder / name) for name in names),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    except _failures() as error:
        raise _explain_push(error, repo_id) from error
    return str(commit.pr_url if create_pr and commit.pr_url else commit.commit_url)


def _explain_push(error: BaseException, name: str) -> CheckpointError:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set"
    elif isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reason = f"HTTP {status} from {constants.ENDPOINT}"
        if status in (401, 403, 404):
            reason += (
                ", which means no right to write there: pass a token with write access (token=..., or `hf auth login`)"
            )
    elif isinstance(error, _http_error()):
        reason = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error})"
    else:
        reason = str(error)
    return CheckpointError(f"{name!r} could not be sent to the hub: {' '.join(reason.split())}")
