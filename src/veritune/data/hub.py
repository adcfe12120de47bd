"""Datasets on the Hugging Face hub, downloaded into its client's own cache, and read from there without a network.

A name is `hf://datasets/USER/NAME[@REVISION][/PATH]`. PATH is a file, a folder or a pattern. A bare name means the
train split of the parquet conversion that the hub keeps of most datasets; `@~parquet` stands for all of it.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote, unquote

import httpx
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import DataError, first_line
from .sources import HUB

CONVERTED = "refs/convert/parquet"
SECONDS = 10.0


def files(name: str, kinds: tuple[str, ...], note: Callable[[str], None]) -> list[tuple[str, Path]]:
    """(what to call it, where it is) for each file that a name stands for and that ends in one of `kinds`. `note` is
    told where a bare name was taken to mean something, and where the cache answered for the hub.

    Raises DataError that says whether the name or the network is at fault.
    """
    repo, revision, inside = _parts(name)
    bare = revision is None and not inside
    revision = CONVERTED if bare else revision
    there = _listed(name, repo, revision, note)
    names = _cached(name, repo, revision) if there is None else there
    wanted = [file for file in sorted(names) if file.lower().endswith(kinds)]
    if bare:
        inside = _train_split(name, wanted)
        note(f"{name}: reading {HUB}datasets/{repo}@~parquet/{inside}")
    wanted = [file for file in wanted if _means(inside, file)]
    if not wanted:
        shown = ", ".join(sorted(names)[:8]) + (", …" if len(names) > 8 else "")
        raise DataError(f"{name}: no file there that veritune reads ({', '.join(kinds)}); it has {shown or 'none'}")
    out = []
    for file in wanted:
        try:
            path = hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_files_only=there is None)
        except (OSError, httpx.HTTPError) as error:  # the hub's own errors are OSErrors
            raise DataError(f"{name}: {file} cannot be downloaded: {first_line(error)}") from None
        out.append((f"{HUB}datasets/{repo}{_at(revision)}/{file}", Path(path)))
    return out


def _parts(name: str) -> tuple[str, str | None, str]:
    """The dataset, its revision if one is named, and the path inside it."""
    kind, *parts = name.removeprefix(HUB).strip("/").split("/")
    user, repo = (*parts, "", "")[:2]
    repo, _, revision = repo.partition("@")
    revision = CONVERTED if revision == "~parquet" else unquote(revision)
    try:
        validate_repo_id(f"{user}/{repo}")
    except HFValidationError:
        kind = ""
    if kind != "datasets" or not user or not repo:
        raise DataError(f"{name}: a hub dataset is named hf://datasets/USER/NAME, then @REVISION or a path in it")
    return f"{user}/{repo}", revision or None, "/".join(parts[2:])


def _at(revision: str | None) -> str:
    """A revision as it stands in a name."""
    return "@~parquet" if revision == CONVERTED else f"@{quote(revision, safe='')}" if revision else ""


def _listed(name: str, repo: str, revision: str | None, note: Callable[[str], None]) -> list[str] | None:
    """The files of a revision, as the hub says; None if only the cache can be asked."""
    if constants.is_offline_mode():
        return None
    try:
        info = HfApi().dataset_info(repo, revision=revision, timeout=SECONDS)
        return [sibling.rfilename for sibling in info.siblings or ()]
    except RevisionNotFoundError:
        if revision == CONVERTED:
            raise DataError(
                f"{name}: the hub keeps no parquet conversion of this dataset; name its files, such as "
                f"{HUB}datasets/{repo}@main/train.jsonl, or all of them with @main"
            ) from None
        raise DataError(f"{name}: the dataset has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise DataError(
            f"{name}: the hub has no such dataset, or it is private or gated and HF_TOKEN does not open it"
        ) from None
    except (HfHubHTTPError, httpx.HTTPError) as error:
        note(f"{name}: the hub cannot be asked ({first_line(error)}); looking into {constants.HF_HUB_CACHE}")
        return None


def _cached(name: str, repo: str, revision: str | None) -> list[str]:
    """The files of a revision that were downloaded earlier."""
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
    except (OSError, ValueError):
        raise DataError(
            f"{name}: cannot be read from the hub ({constants.ENDPOINT}): it is offline or out of reach, and the local "
            f"cache ({constants.HF_HUB_CACHE}) has nothing of this dataset. Or download its files and name those"
        ) from None
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _train_split(name: str, converted: list[str]) -> str:
    """The pattern of the train split among a conversion's files, CONFIGURATION/SPLIT/NNNN.parquet."""
    with_train = sorted({file.split("/")[0] for file in converted if file.split("/")[1:2] == ["train"]})
    if "default" in with_train:
        with_train = ["default"]
    if len(with_train) != 1:
        all_of_it = sorted({"/".join(file.split("/")[:2]) for file in converted})
        raise DataError(
            f"{name}: which part? Its parquet conversion has {', '.join(all_of_it) or 'nothing'}; name one, such as "
            f"{name.rstrip('/')}@~parquet/{all_of_it[0] if all_of_it else 'default/train'}"
        )
    return f"{with_train[0]}/train/*.parquet"


def _means(inside: str, file: str) -> bool:
    return not inside or file == inside or file.startswith(f"{inside}/") or fnmatchcase(file, inside)
