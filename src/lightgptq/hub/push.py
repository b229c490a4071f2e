"""push_to_hub(): a checkpoint's folder and its model card to a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from lightgptq.checkpoint.source import CLIENT_ERRORS
from lightgptq.errors import CheckpointError, HubError, UsageError
from lightgptq.evaluation.saved import SavedFigures
from lightgptq.hub.card import model_card

CARD_FILE = "README.md"
NOT_UPLOADED = ["*.partial", "*.partial/**", ".*", ".*/**", "__pycache__/**"]

# The last two come from its threads and from answers that it does not understand.
UPLOAD_ERRORS: tuple[type[Exception], ...] = (*CLIENT_ERRORS, RuntimeError, ValueError)


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    card      the model card's file
    new_card  whether it was written now; an existing one is the user's and is uploaded as it is
    url       of the commit, None for a dry run
    """

    card: Path
    new_card: bool
    url: str | None


def push_to_hub(
    checkpoint: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    figures: Sequence[SavedFigures] | None = None,
    rewrite_card: bool = False,
    commit_message: str = "GPTQ checkpoint by lightgptq",
    dry_run: bool = False,
    endpoint: str | None = None,
) -> PushResult:
    """Upload a checkpoint's folder with a model card; an interrupted upload goes on when called again.

    repo       ORGANISATION/NAME, made if it does not exist; ``private`` only counts then
    revision   branch to push to, made if it does not exist; default main
    token      with write access; default the one that ``hf auth login`` stored or HF_TOKEN holds
    base_model, license, figures  for the card, see `model_card`
    rewrite_card  replace a README.md that is there; by default it is uploaded as it is
    dry_run    only write the card into the folder
    endpoint   of another hub; default HF_ENDPOINT or huggingface.co

    Raises UsageError without a token, CheckpointError for a folder without a checkpoint, HubError when the hub refuses
    or cannot be reached; the token never stands in a message.
    """
    folder = Path(checkpoint)
    content = model_card(
        folder, repo, revision=revision, base_model=base_model, license=license, figures=figures
    )
    card = folder / CARD_FILE
    new_card = rewrite_card or not card.exists()
    if new_card:
        try:
            card.write_text(content, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{card}: cannot be written: {error.strerror or error}") from error
    if dry_run:
        return PushResult(card, new_card, None)
    token = token or huggingface_hub.get_token()
    if not token:
        raise UsageError("no token for the hub; give one, set HF_TOKEN, or run `hf auth login`")
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
    with _hub_errors(repo, token):
        name = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if revision not in (None, "main"):
            api.create_branch(name, branch=str(revision), exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            ignore_patterns=list(NOT_UPLOADED),
        )
    return PushResult(card, new_card, str(commit.commit_url))


@contextmanager
def _hub_errors(repo: str, token: str) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence without the token.

    The original errors are not chained: a server may repeat the token that it refuses, and a traceback shows that.
    """
    try:
        yield
    except UPLOAD_ERRORS as error:
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        sentences = dict.fromkeys(" ".join(str(cause).split()) or type(cause).__name__ for cause in causes)
        message = "; ".join(sentences).replace(token, "<token>")
        raise HubError(
            f"{repo}: the hub did not take it: {message}; the same command goes on where it stopped"
        ) from None
