"""Upload of a released folder to branches of a Hub repository: calls that can be read before they are made."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CheckFailed, ConfigError
from common.files import sha256_file


@dataclass(frozen=True)
class Call:
    """One call of `huggingface_hub.HfApi`."""

    method: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"HfApi().{self.method}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"


def check_repository(name: str) -> None:
    """Checks that the Hub could have a repository of this name, before it is written into a card.

    Raises:
        ConfigError: it could not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        limit = (
            "must be organisation/name by the Hub's rules: letters, digits, -, _ and ., a name of at most 96 "
            "characters that neither begins nor ends with - or ., without -- and .., and not ending in .git"
        )
        raise ConfigError("--push", name, limit, "correct it, such as my-team/my-model")


def check_revision(name: str) -> None:
    """Checks that git could have a branch of this name (git-check-ref-format), before it is written into a card.

    Raises:
        ConfigError: it could not.
    """
    parts = name.split("/")
    bad = re.search(r"[\x00-\x20\x7f~^:?*\[\\\"]|\.\.|@\{", name) or name == "@" or name.startswith("-")
    if bad or any(not part or part.startswith(".") or part.endswith((".", ".lock")) for part in parts):
        limit = "must be the name of a branch by git's rules, without spaces, quotes and any of ~^:?*[\\"
        raise ConfigError("--revision", name, limit, "correct it, such as iter1000")


def plan_push(folder: Path, repository: str, branches: Sequence[str], private: bool, message: str) -> list[Call]:
    """The calls that make each branch equal to the folder. Any of them may be repeated."""
    calls = [Call("create_repo", {"repo_id": repository, "private": private, "exist_ok": True})]
    for branch in branches:
        if branch != "main":
            calls.append(Call("create_branch", {"repo_id": repository, "branch": branch, "exist_ok": True}))
        calls.append(
            Call(
                "upload_folder",
                {
                    "repo_id": repository,
                    "folder_path": str(folder),
                    "revision": branch,
                    "commit_message": message,
                    "delete_patterns": "*",
                },
            )
        )
    return calls


def push(calls: Sequence[Call]) -> None:
    """Makes the calls, then compares every branch with the folder.

    Raises:
        ConfigError: the Hub refuses. CheckFailed: a branch is not what the folder is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    http_error: type[Exception] = HfHubHTTPError.__bases__[0]  # of httpx, or httpx2 since huggingface_hub 2

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    api = HfApi()
    repository = calls[0].arguments["repo_id"]
    try:
        for call in calls:
            getattr(api, call.method)(**call.arguments)
        for call in calls:
            if call.method == "upload_folder":
                branch = call.arguments["revision"]
                remote = api.list_repo_tree(repository, revision=branch, recursive=True)
                compare(Path(call.arguments["folder_path"]), remote, f"{repository}@{branch}")
    except (HfHubHTTPError, HFValidationError) as error:
        limit = f"the Hub refuses: {str(error).strip().splitlines()[0]}"
        cure = "log in (hf auth login, or HF_TOKEN) with a token that may write there, or correct the name"
        raise ConfigError("--push", repository, limit, cure) from None
    except OfflineModeIsEnabled:
        limit = "the Hub cannot be reached: HF_HUB_OFFLINE is set"
        raise ConfigError("--push", repository, limit, "unset it where there is a network") from None
    except http_error as error:
        limit = f"the Hub cannot be reached: {error}"
        raise ConfigError("--push", repository, limit, "run the same command where there is a network") from None


def compare(folder: Path, remote: Any, name: str) -> None:
    """Checks that the files of a branch are those of the folder: names, sizes, and hashes where the Hub has them.

    Raises:
        CheckFailed: they differ.
    """
    there = {file.path: file for file in remote if hasattr(file, "size") and file.path != ".gitattributes"}
    here = {path.name: path for path in folder.iterdir()}
    wrong = sorted(there.keys() ^ here.keys())
    for file in sorted(there.keys() & here.keys()):
        lfs = there[file].lfs
        size = lfs.size if lfs else there[file].size
        if size != here[file].stat().st_size or (lfs and lfs.sha256 != sha256_file(here[file])):
            wrong.append(file)
    if wrong:
        raise CheckFailed("--push", name, f"differs from {folder}: {', '.join(wrong)}", "run the same command again")


def check_sums(folder: Path) -> None:
    """Checks the folder against its SHA256SUMS.

    Raises:
        CheckFailed: a file is missing, extra or changed.
    """
    path = folder / "SHA256SUMS"
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.is_file() else []
    rows = [line.partition("  ") for line in lines]
    sums = {name: digest for digest, _, name in rows}
    names = {file.name for file in folder.iterdir()} - {path.name}
    changed = [name for name in sorted(names & sums.keys()) if sha256_file(folder / name) != sums[name]]
    if not sums or changed or names != sums.keys():
        what = ", ".join(changed or sorted(names ^ sums.keys())) or "no SHA256SUMS"
        what = what if all(name for *_, name in rows) else path.name
        raise CheckFailed("release", folder, f"is not what was released: {what}", "remove it and release again")
