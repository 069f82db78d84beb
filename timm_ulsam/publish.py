"""Publish weights: `weights/<arch>.<tag>/` becomes the Hub repository `ORG/<arch>.<tag>`, and nothing else is in it."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from . import __version__
from .errors import InputError, WeightsError
from .pretrained import WEIGHTS_FILE, check_digest, file_digest, git_digest, recorded_digest, weights_dir

FILES = ("README.md", "config.json", WEIGHTS_FILE)
_MADE_BY_THE_HUB = (".gitattributes",)
# what huggingface_hub talks HTTP with, by its version: their errors have nothing in common
_HTTP_LIBRARIES = ("requests", "urllib3", "httpx", "httpx2")


@dataclass(frozen=True)
class Published:
    """What publishing did to a repository, or would do.

    Attributes:
        repo: `ORG/<arch>.<tag>`.
        created: Whether the repository was made.
        added: Files that were new or other than at the Hub.
        deleted: Files at the Hub that do not belong there.
        url: Of the commit or the pull request; None if nothing was to be done or nothing was done.
        proposed: Whether `url` is an open pull request that holds these files already.
    """

    repo: str
    created: bool = False
    added: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    url: str | None = None
    proposed: bool = False


def publish(
    names: Iterable[str],
    org: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
) -> Iterator[Published]:
    """Publish sets of weights, one repository after the other; all folders are checked before the first.

    A repository that holds the files already is left alone. What an interrupted call has uploaded is not uploaded
    again, and its repository shows nothing of it: the files of a repository appear in one commit.

    Args:
        names: Sets of weights, `<arch>.<tag>`.
        org: Organization or user at the Hub.
        private: Make new repositories private.
        revision: Branch to commit to, made if it is missing; the main one by default.
        create_pr: Open a pull request (against `revision`, which must exist then) in the place of a commit.
        dry_run: Change nothing at the Hub.

    Raises:
        InputError: If a folder is missing or holds something else, if its card loads the weights from another's
            repository, if there is no token, no permission or no network, or if the Hub refuses.
        WeightsError: If the digest of a weight file is not the recorded one, here or at the Hub afterwards.
    """
    folders = [_checked_folder(name, org) for name in names]
    api = HfApi(library_name="timm-ulsam", library_version=__version__)
    if get_token() is None:
        raise InputError(f"no token for {api.endpoint}: set HF_TOKEN, or log in with `hf auth login`")
    with _explained(api, "read who the token is of"):
        user = api.whoami()["name"]
    for folder in folders:
        repo = f"{org}/{folder.name}"
        with _explained(api, f"publish {repo} as {user}"):
            done = _publish(api, folder, repo, private, revision, create_pr, dry_run)
        yield done


def _checked_folder(name: str, org: str) -> Path:
    folder = weights_dir() / name
    if not folder.is_dir() or Path(name).name != name or "." not in name:
        known = sorted(path.parent.name for path in weights_dir().glob(f"*/{WEIGHTS_FILE}"))
        raise InputError(f"{weights_dir()} holds no weights {name!r}; accepted: {', '.join(known)}")
    found = sorted(path.name for path in folder.iterdir())
    if found != sorted(FILES):
        raise InputError(f"{folder} must hold {', '.join(FILES)} and nothing else; it holds {', '.join(found)}")
    card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    others = {found for found in re.findall(rf"hf-hub:([\w.-]+)/{re.escape(name)}(?![\w.-])", card) if found != org}
    if others:
        raise InputError(
            f"the card of {name} loads it from {', '.join(sorted(others))}, not from {org}: "
            f"timm-ulsam card {name} --org {org}"
        )
    check_digest(folder / WEIGHTS_FILE, recorded_digest(name), "Nothing was published.")
    return folder


def _publish(
    api: HfApi, folder: Path, repo: str, private: bool, revision: str | None, create_pr: bool, dry_run: bool
) -> Published:
    is_new = False
    try:
        if private and not api.repo_info(repo).private:
            raise InputError(f"{repo} is public, and --private is for new repositories: change it in its settings")
        base, at_base = _state(api, repo, revision)
    except RepositoryNotFoundError:
        is_new = True
        if dry_run:
            return Published(repo, created=True, added=FILES)
        api.create_repo(repo, private=private or None, exist_ok=True)
        base, at_base = _state(api, repo, revision)
    if base is None:  # a branch that is to be made, from the main one
        if create_pr:
            raise InputError(f"{repo} has no revision {revision!r}, which the pull request would be against")
        if not dry_run:
            api.create_branch(repo, branch=revision, exist_ok=True)
        base, at_base = _state(api, repo, None)
    added, deleted = _differences(folder, at_base)
    done = Published(repo, is_new, added, deleted)
    if dry_run or not (added or deleted):
        return done
    if create_pr and (url := _open_pull_request(api, repo, revision or "main", folder)):
        return Published(repo, url=url, proposed=True)

    operations = [CommitOperationAdd(path, str(folder / path)) for path in added]
    operations += [CommitOperationDelete(path) for path in deleted]
    commit = api.create_commit(
        repo,
        operations,
        commit_message=f"Publish {folder.name}",
        commit_description=f"SHA-256 of {WEIGHTS_FILE}: {recorded_digest(folder.name)}",
        revision=revision,
        create_pr=create_pr,
        parent_commit=base,
    )
    if any(_differences(folder, _state(api, repo, commit.oid)[1])):
        raise WeightsError(f"{repo} at {commit.oid} does not hold what was uploaded: {commit.commit_url}")
    return Published(repo, is_new, added, deleted, commit.pr_url or commit.commit_url)


def _state(api: HfApi, repo: str, revision: str | None) -> tuple[str | None, dict[str, RepoFile]]:
    """Commit and files of a repository; (None, {}) if there is no such revision."""
    try:
        commit = api.repo_info(repo, revision=revision).sha
        tree = list(api.list_repo_tree(repo, recursive=True, revision=commit))
    except RevisionNotFoundError:
        return None, {}
    return commit, {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _differences(folder: Path, remote: dict[str, RepoFile]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files that are other here than at the Hub, and those that are only there."""
    added = tuple(path for path in FILES if path not in remote or not _is_same(folder / path, remote[path]))
    deleted = tuple(path for path in remote if path not in (*FILES, *_MADE_BY_THE_HUB))
    return added, deleted


def _is_same(file: Path, remote: RepoFile) -> bool:
    if remote.lfs:
        return remote.lfs.sha256 == file_digest(file)
    return remote.blob_id == git_digest(file)


def _open_pull_request(api: HfApi, repo: str, branch: str, folder: Path) -> str | None:
    """Address of an open pull request against a branch that holds these very files."""
    for discussion in api.get_repo_discussions(repo):
        if discussion.is_pull_request and discussion.status == "open":
            _, files = _state(api, repo, f"refs/pr/{discussion.num}")
            if files and not any(_differences(folder, files)):
                target = api.get_discussion_details(repo, discussion.num).target_branch
                if target.removeprefix("refs/heads/") == branch.removeprefix("refs/heads/"):
                    return discussion.url
    return None


@contextmanager
def _explained(api: HfApi, purpose: str) -> Iterator[None]:
    """Whatever goes wrong on the way to the Hub, or there, becomes one sentence."""
    try:
        yield
    except (InputError, WeightsError):
        raise
    except Exception as error:
        causes = list(_chain(error))  # of a failed upload the client says first only which file it was
        answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
        if answer is not None:
            status = answer.response.status_code
            known = {401: "the token is not valid", 403: "the token has no permission"}
            why = known.get(status, f"{api.endpoint} answered {status}")
            said = answer.server_message or str(answer).splitlines()[0]
            raise InputError(f"cannot {purpose}: {why} ({said})") from error
        if any(_is_of_the_network(cause) for cause in causes):
            raise InputError(f"cannot {purpose}: cannot reach {api.endpoint} ({causes[-1]})") from error
        if isinstance(error, OSError):
            raise  # of a file here
        raise InputError(f"cannot {purpose}: {type(error).__name__}: {error}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_of_the_network(error: BaseException) -> bool:
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split(".")[0] in _HTTP_LIBRARIES
