"""Uploading a checkpoint folder in one commit with a model card, and explanations of the Hub's errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..checkpoint.files import INDEX, check_index
from ..checkpoint.inspect import inspect_components
from ..checkpoint.results import read_results
from ..errors import CheckpointError, ConfigError, HubError
from ..evaluation.published import read_evaluation
from .cards import CARD, base_card, is_handwritten, render_card

UNSAFE = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")
TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "ssl", "socket")
XET_TOKEN = "xet-write-token"  # part of the first URL that an upload requests when hf_xet is installed
FULL = ("storage", "quota", "space left", "payment")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    evaluation: str | Path | None = None,
) -> CommitInfo:
    """Upload a quantized model or pipeline. The repository is created if needed; all files arrive in one commit, or none.

    The folder is not changed: the card is made for the upload, unless the folder holds one that was written by hand. After a
    failure call this again: huggingface_hub does not send files again that have arrived.

    Args:
        folder: the folder that ``save_pretrained`` or ``qdiff quantize`` wrote.
        repo_id: "owner/name", or "name" for a repository of your own.
        private: whether a new repository is private; ``None`` for the owner's default.
        revision: branch to commit to, created if needed; by default the main one.
        message: message of the commit.
        token: token to use instead of the stored login.
        evaluation: output folder of ``qdiff eval`` with a row of this checkpoint: its scores and pictures go into the card.

    Raises:
        ConfigError: ``repo_id`` cannot be a name on the Hub, or ``evaluation`` has no such row.
        CheckpointError: the folder is no complete checkpoint; checked before anything is sent.
        HubError: the Hub refused, or could not be reached.
    """
    folder = Path(folder)
    check_name(repo_id)
    files = {path.relative_to(folder).as_posix(): path for path in check_complete(folder)}
    evaluated = read_evaluation(evaluation, folder) if evaluation else None
    api = HfApi(token=token, library_name="qdiff-diffusers")
    with _explained(repo_id):
        user = api.whoami()["name"]
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    contents: dict[str, Path | bytes] = {**files, **(evaluated.files() if evaluated else {})}
    if not is_handwritten(folder / CARD):
        contents[CARD] = str(render_card(folder, repo_id, base_card(folder), evaluated)).encode()
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    with _explained(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id, operations=operations, commit_message=message or f"Upload {folder.resolve().name}", revision=revision
        )


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """A context that turns errors of requests to the Hub into a :class:`HubError`."""
    try:
        yield
    except Exception as error:
        if (text := explain(error, repo_id)) is None:
            raise
        raise HubError(text) from error


def check_name(repo_id: str) -> None:
    """Raise a :class:`ConfigError` unless ``repo_id`` can be the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} cannot be a name on the Hub: {error}") from error


def check_complete(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint that is fit to share.

    Raises:
        CheckpointError: the folder is no qdiff checkpoint, a part is missing or damaged, or it holds pickles.
    """
    inspect_components(folder)
    read_results(folder)
    if (folder / "model_index.json").is_file():
        _check_components(folder)
    for path in sorted(folder.rglob("*")):
        if INDEX.fullmatch(path.name):
            check_index(path)
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        if path.suffix.lower() in UNSAFE:
            raise CheckpointError(f"{path} is a pickle, which runs code when it is loaded; save with safetensors and remove it")
        if parts != (CARD,) or is_handwritten(path):
            yield path


def _check_components(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if not isinstance(index, dict) or "_class_name" not in index:
        raise CheckpointError(f"{folder / 'model_index.json'} names no pipeline class")
    for name, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and value[0]) or name.startswith("_"):
            continue
        part = folder / name
        if not part.is_dir() or not any(part.glob("*.json")):
            raise CheckpointError(f"{folder} lacks {name}/, which model_index.json names; the pipeline is incomplete")
        weights = [*part.glob("*.safetensors")]
        if (part / "config.json").is_file() and not weights and not any(part.glob("*.index.json")):
            raise CheckpointError(f"{part} holds no safetensors file; the pipeline is incomplete")


def explain(error: BaseException, repo_id: str) -> str | None:
    """One sentence on what the Hub objects to and what to do; ``None`` for an error that does not come from the Hub."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, LocalTokenNotFoundError):
            return "you are not logged in; run `hf auth login`, or set HF_TOKEN to a token that may write"
        if isinstance(link, HfHubHTTPError) and link.response is not None:
            return _refusal(link, repo_id)
    if any(XET_TOKEN in str(link) and "404" in str(link) for link in chain):
        return "there is no Xet storage at HF_ENDPOINT, where this huggingface_hub sends large files; set HF_HUB_DISABLE_XET=1"
    for link in chain:
        if type(link).__module__.partition(".")[0] in TRANSPORTS or isinstance(link, ConnectionError | TimeoutError):
            return (
                f"the connection to the Hub failed ({type(link).__name__}: {_line(link)}); run the same command again: "
                "files that have arrived are not sent again, and nothing was committed"
            )
    if isinstance(error, ValueError | RuntimeError):  # of a card's metadata, of the storage service
        return f"the Hub did not take {repo_id}: {_line(chain[-1] if isinstance(error, RuntimeError) else error)}"
    return None


def _refusal(error: HfHubHTTPError, repo_id: str) -> str:
    response: Any = error.response
    status, told = response.status_code, _server_message(error)
    if status == 429:
        after = response.headers.get("Retry-After")
        when = f"in {after} seconds" if after and after.isdigit() else "in some minutes"
        return f"the Hub asks for patience, there were too many requests (429); run the same command again {when}"
    if status in (402, 403, 507) and any(word in told.lower() for word in FULL):
        return f"the Hub has no space left for {repo_id} ({status}: {told}); free some in your storage settings, or ask for more"
    if status == 401:
        return f"the Hub does not accept your token (401: {told}); run `hf auth login`, or set HF_TOKEN to a token that may write"
    if status == 403:
        return f"your token may not write to {repo_id} (403: {told}); use one with write access there, or another name"
    if status == 404:
        return f"the Hub has no {repo_id}, or your token may not see it (404: {told})"
    if status in (409, 412):
        return f"{repo_id} was changed by someone else at the same time ({status}: {told}); run the same command again"
    if status == 413:
        return f"a file is too large for the Hub (413: {told}); save with smaller shards: save_pretrained(max_shard_size='5GB')"
    if status >= 500:
        return f"the Hub has trouble of its own ({status}: {told}); run the same command again later"
    return f"the Hub did not take {repo_id} ({status}: {told})"


def _server_message(error: HfHubHTTPError) -> str:
    """The server's message, without huggingface_hub's advice around it."""
    response: Any = error.response
    said = response.headers.get("X-Error-Message")
    if not said:
        try:
            said = response.json().get("error")
        except Exception:  # not JSON, or not read
            said = None
    return _line(said or getattr(response, "reason_phrase", None) or error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _line(text: object) -> str:
    return " ".join(str(text).split()).rstrip(".")[:300]
