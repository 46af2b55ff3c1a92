"""The Hugging Face hub: what a name means there, which files a data set has, and why the hub cannot be read.

`datasets` finds the files of a configuration and a split. `huggingface_hub` downloads them. Both wait as long as a
status 429 asks for, repeat requests that fail with a 5xx status, and resume a broken download.
"""

import errno
import json
import os
import re
import sys
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote, urlsplit

from files import atomic_write, sha256_of
from readers import SUFFIXES, file_format
from rows import SourceError, listed

PATHS_AT_ONCE = 500  # paths in a request for sizes and digests
STREAM_BLOCK = 2**24  # bytes per request
GONE = (401, 403, 404, 410, 451)  # statuses of a hub that answers, but does not give what was asked for
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)

_REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"
_REVISION = r"(?:@(?P<revision>refs/\w+/[^/:]+|[^/:]+))?"
_SPLIT = r"(?::(?P<config>[^:/]*)(?::(?P<split>[^:/]+))?)?"
DATASET_NAME = re.compile(_REPOSITORY + _REVISION + _SPLIT, re.ASCII)
HF_ADDRESS = re.compile(rf"hf://datasets/{_REPOSITORY}{_REVISION}(?:/(?P<folder>[^:]+?))?/?{_SPLIT}", re.ASCII)
PAGE_PATH = re.compile(
    rf"/datasets/{_REPOSITORY}/?(?:(?:tree|blob|raw|resolve)/(?P<revision>[^/]+)/?(?P<folder>.*?)/?"
    r"|viewer(?:/(?P<config>[^/]+))?(?:/(?P<split>[^/]+))?/?)?",
    re.ASCII,
)


@dataclass(frozen=True)
class DatasetName:
    """A data set of the hub: one split of one configuration, or all files in one of its folders."""

    repository: str  # OWNER/NAME
    revision: str | None = None  # branch, tag or commit. None: the newest
    folder: str = ""  # a folder or a file in the repository; then there is no config
    config: str | None = None  # None: the only one
    split: str = "train"

    def __str__(self) -> str:
        where = f"/{self.folder}" if self.folder else f":{self.config or ''}:{self.split}".replace("::train", "")
        return self.repository + (f"@{self.revision}" if self.revision else "") + where


@dataclass(frozen=True)
class HubFile:
    """A file of a data set. `sha256` is None if the file is so small that the hub keeps it in git itself."""

    path: str
    size: int
    sha256: str | None


def parse_name(word: str) -> DatasetName | None:
    """The data set that a word names: OWNER/NAME[@REVISION][:CONFIG[:SPLIT]], hf://datasets/..., or a page's address.

    None if the word names none.
    """
    if word.startswith("hf://"):
        match = HF_ADDRESS.fullmatch(word)
    elif "://" in word:
        from huggingface_hub import constants

        address = urlsplit(word)
        hosts = ("huggingface.co", "www.huggingface.co", "hf.co", urlsplit(constants.ENDPOINT).netloc)
        match = PAGE_PATH.fullmatch(address.path) if address.netloc.lower() in hosts else None
    else:
        match = DATASET_NAME.fullmatch(word.rstrip("/"))
    if match is None:
        return None
    parts = {name: unquote(part) for name, part in match.groupdict().items() if part}
    return None if "folder" in parts and "config" in parts else DatasetName(**parts)


def resolve(name: DatasetName) -> tuple[str, list[HubFile]]:
    """The commit of a data set, and its files in order. Offline: those that huggingface_hub's cache holds.

    Raises:
        SourceError: the data set has no such configuration or split, or its files hold no text.
        Exception: the hub cannot be read. `failure` makes a SourceError of it.
    """
    from huggingface_hub import HfApi, RepoFile, constants

    if constants.HF_HUB_OFFLINE:
        return _resolve_offline(name)
    reach_hub()
    api, repository = HfApi(), {"repo_id": name.repository, "repo_type": "dataset"}
    repository["revision"] = commit = api.dataset_info(name.repository, revision=name.revision).sha
    if not name.folder:
        prefix = f"hf://datasets/{name.repository}@{commit}/"
        paths = [path.removeprefix(prefix) for path in _files_of_split(name.repository, commit, name)]
    elif file_format(name.folder):
        paths = [name.folder]
    else:
        tree = api.list_repo_tree(path_in_repo=name.folder, recursive=True, **repository)
        paths = [entry.path for entry in tree if file_format(entry.path)]
    found = {}
    for start in range(0, len(paths), PATHS_AT_ONCE):
        entries = api.get_paths_info(paths=paths[start : start + PATHS_AT_ONCE], **repository)
        found |= {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    if not paths:
        raise SourceError(f"{name}: holds no file that ends in {SUFFIXES}; name another data set or folder")
    if missing := [path for path in paths if path not in found]:
        raise SourceError(f"{name}: the hub lists {missing[0]} but lacks it; run this again, or name a revision")
    entries = [found[path] for path in (sorted(paths) if name.folder else paths)]
    files = [HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None) for entry in entries]
    # Only a run without a network needs this note. So a disk that is full or read-only does not matter here.
    with suppress(OSError), atomic_write(_listing(name), "w") as file:
        json.dump({"commit": commit, "files": list(map(astuple, files))}, file)
    return commit, files


def _listing(name: DatasetName) -> Path:
    """Where the commit and the files of a data set are noted, for a run without a network."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "file_lists" / re.sub(r"[^\w.@-]", "--", f"{name}.json")


def _resolve_offline(name: DatasetName) -> tuple[str, list[HubFile]]:
    """The files that an earlier run has noted; or else those of a copy that another program has put into the cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    if _listing(name).is_file():
        noted = json.loads(_listing(name).read_text(encoding="utf-8"))
        return noted["commit"], [HubFile(*file) for file in noted["files"]]
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        repositories = []
    cached = [repo for repo in repositories if (repo.repo_type, repo.repo_id) == ("dataset", name.repository)]
    revisions = [r for repo in cached for r in repo.revisions if name.revision in (None, r.commit_hash, *r.refs)]
    if not revisions:
        raise SourceError(f"{name}: not in huggingface_hub's cache, and HF_HUB_OFFLINE is set; unset it")
    revision = max(revisions, key=lambda revision: revision.last_modified)
    root = revision.snapshot_path
    if not name.folder:
        paths = [Path(path) for path in _files_of_split(str(root), None, name)]
    else:
        folder = root / name.folder
        paths = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if file_format(path.name))
    files = [HubFile(path.relative_to(root).as_posix(), path.stat().st_size, None) for path in paths]
    print(f"{name}: HF_HUB_OFFLINE is set; taking the {len(files)} files that the cache holds", file=sys.stderr)
    return revision.commit_hash, files


def _files_of_split(place: str, commit: str | None, name: DatasetName) -> list[str]:
    """Paths of the files of a split, as `datasets` finds them. `place`: a repository of the hub, or its local copy."""
    import datasets

    configs = datasets.get_dataset_config_names(place, revision=commit)
    if name.config is None and len(configs) > 1:
        raise SourceError(
            f"{name.repository}: has several configurations ({listed(configs)}); "
            f"name one: {name.repository}:{configs[0]}"
        )
    config = configs[0] if name.config is None else name.config
    if config not in configs:
        raise SourceError(f"{name.repository}: no configuration {config!r}, only {listed(configs)}; name one of them")
    splits = datasets.load_dataset_builder(place, config, revision=commit).config.data_files or {}
    if name.split not in splits:
        raise SourceError(
            f"{name.repository}: no split {name.split!r} in {config}, only {listed(splits)}; "
            f"name one: {name.repository}:{config}:{next(iter(splits), 'SPLIT')}"
        )
    paths = list(splits[name.split])
    if unknown := [path for path in paths if not file_format(path)]:
        raise SourceError(
            f"{name.repository}: {PurePosixPath(unknown[0]).name} is no text; files must end in {SUFFIXES}"
        )
    return paths


def open_stream(name: DatasetName, commit: str, file: HubFile) -> IO[bytes]:
    """A file of the hub, read over the network."""
    from huggingface_hub import HfFileSystem

    path = f"datasets/{name.repository}@{commit}/{file.path}"
    return HfFileSystem().open(path, block_size=STREAM_BLOCK, cache_type="readahead")


def download(name: DatasetName, commit: str, file: HubFile) -> str:
    """Download a file into huggingface_hub's cache, unless it is there. Return its path. OSError: it is damaged."""
    import huggingface_hub

    path = huggingface_hub.hf_hub_download(name.repository, file.path, repo_type="dataset", revision=commit)
    if os.path.getsize(path) != file.size or file.sha256 not in (None, sha256_of(path)):
        os.remove(os.path.realpath(path))  # `path` may be a link: remove the file itself
        raise OSError(f"{file.path} came damaged")
    return path


def reach_hub() -> None:
    """Send the hub one request, unless HF_HUB_OFFLINE is set. huggingface_hub would retry for about 30 s.

    Raises:
        requests.RequestException: no answer came. An answer with an error status raises nothing.
    """
    import requests
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        requests.head(constants.ENDPOINT, timeout=30)


# ---------------------------------------------------------------- errors


def http_status(error: Exception) -> int | None:
    """The status of the HTTP response that caused an error. None if no response came."""
    response = getattr(error, "response", None)
    if response is None:  # not `or`: a response with an error status is falsy
        response = getattr(error.__cause__, "response", None)
    return None if response is None else response.status_code


def is_final(error: Exception) -> bool:
    """Whether another attempt cannot help: the hub refuses or is not asked, the disk is full or read-only."""
    from huggingface_hub import constants

    status = http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 429)
    return constants.HF_HUB_OFFLINE or (isinstance(error, OSError) and error.errno in DISK_ERRORS)


def error_reason(error: Exception) -> str:
    """A few words that say why the hub could not be read: a status, or the kind of error."""
    import requests

    status = http_status(error)
    if status is not None:
        return f"status {status}"
    if isinstance(error, requests.RequestException):
        return type(error).__name__  # its message is a long chain of nested errors
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def failure(name: DatasetName, error: Exception) -> SourceError:
    """The SourceError for an error of a client of the hub. It says what failed, and names the cure."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/datasets/{name.repository}"
    if isinstance(error, SourceError):
        return error
    if isinstance(error, errors.GatedRepoError):
        what = f"is gated; accept its conditions on {page}, then run `hf auth login` (or set HF_TOKEN) and this again"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = (
            "the hub has no data set of this name, or it is private, and there is no file or folder of this name here; "
            "check the name, or run `hf auth login` (or set HF_TOKEN) and this again"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        what = f"has no revision {name.revision}; {page}/commits/main lists them"
    elif isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) and constants.HF_HUB_OFFLINE:
        what = "a file is not in huggingface_hub's cache, and HF_HUB_OFFLINE is set; unset it"
    elif isinstance(error, OSError) and error.errno in DISK_ERRORS:
        what = f"cannot be written into {constants.HF_HUB_CACHE} ({error.strerror}); make room, or pass --stream"
    elif isinstance(error, FileNotFoundError | RuntimeError) and type(error).__module__.startswith(
        ("datasets", "builtins")
    ):
        what = f"`datasets` finds no files to read ({error_reason(error)}); name one of its folders: hf://datasets/..."
    elif constants.HF_HUB_OFFLINE:
        what = f"the cache holds only a part of it ({error_reason(error)}), and HF_HUB_OFFLINE is set; unset it"
    elif http_status(error) in GONE:
        what = f"the hub does not give it ({error_reason(error)}); see {page}"
    else:
        what = (
            f"could not be read from {constants.ENDPOINT} ({error_reason(error)}); check the network "
            "(and HF_ENDPOINT, if set) and run this again; --source sample needs no network"
        )
    return SourceError(f"{name.repository}: {what}")


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
