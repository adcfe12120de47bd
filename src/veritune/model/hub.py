"""Whether the model hub can be reached and knows a name, asked once and quickly: the hub's own client retries a network
that is not there for most of a minute, for each file."""

from pathlib import Path

import httpx
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import ModelError

SECONDS = 10.0


def check(path: str) -> None:
    """Returns if the hub has a model `path`, or the local cache does: then, with no network, only that is read.

    Raises ModelError that says whether the name or the network is at fault.
    """
    try:
        validate_repo_id(path)
    except HFValidationError:
        raise ModelError(
            f"model.path = {path!r}: neither a folder here nor a name that the hub could have. It must be a hub id, a "
            "folder with config.json, weights and tokenizer.json, or a .gguf file"
        ) from None
    cached = folder(path) is not None
    if constants.is_offline_mode():
        if not cached:
            raise _missing(path, "the hub is not asked, because HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set")
        return
    try:
        HfApi().model_info(path, timeout=SECONDS)
    except RepositoryNotFoundError:
        raise ModelError(
            f"model.path = {path!r}: the hub has no such model, or it is private or gated and HF_TOKEN does not open "
            "it. It is no folder here either"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if not cached:
            raise _missing(path, f"the hub answered with status {status}") from None
        constants.HF_HUB_OFFLINE = True
    except httpx.HTTPError as error:
        if not cached:
            raise _missing(path, f"{constants.ENDPOINT} cannot be reached ({error})") from None
        constants.HF_HUB_OFFLINE = True  # its client reads this before each request, and retries otherwise


def folder(path: str) -> Path | None:
    """Where the local cache holds the files of a model."""
    found = try_to_load_from_cache(path, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _missing(path: str, why: str) -> ModelError:
    return ModelError(
        f"model.path = {path!r}: no folder here has this name, the local cache ({constants.HF_HUB_CACHE}) has no such "
        f"model, and {why}. It must be a hub id (with a network, or in the local cache), a folder with config.json, "
        "weights and tokenizer.json, or a .gguf file"
    )
