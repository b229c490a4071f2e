"""Where a checkpoint's files come from: a local folder, or a hub repository, one file at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from lightgptq.checkpoint.safetensors_header import TensorEntry, parse_entry
from lightgptq.errors import CheckpointError

# Files that travel with a model besides weights, config and index: tokenizers, templates, generation
# defaults.
COMPANION_NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)
LICENCE_NAMES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")

# What the hub's client raises for a request that failed or an answer that makes no sense. Its version 1 lets errors of
# httpx through and 2 those of httpx's successor, which are no OSErrors; HfHubHTTPError derives from either.
CLIENT_ERRORS: tuple[type[Exception], ...] = (
    *(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError" and issubclass(c, Exception)),
    OSError,
    SafetensorsParsingError,
)


class FileSource(Protocol):
    """Files by name. ``path`` returns None for a file that the source does not have."""

    @property
    def label(self) -> str: ...

    def path(self, name: str) -> Path | None: ...

    def identity(self) -> dict[str, Any]: ...

    def remote_tensors(self, name: str) -> Mapping[str, TensorEntry] | None: ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine."""

    root: Path

    @property
    def label(self) -> str:
        return str(self.root)

    def path(self, name: str) -> Path | None:
        """The file's path, or None when there is no such file."""
        path = self.root / name
        return path if path.is_file() else None

    def identity(self) -> dict[str, Any]:
        """Nothing: a folder may move, and its files identify it."""
        return {}

    def remote_tensors(self, name: str) -> None:
        """Nothing here is remote."""

    def names(self) -> list[str]:
        """Names of all files in the folder itself."""
        return sorted(path.name for path in self.root.iterdir() if path.is_file())


@dataclass
class HubRepo:
    """A model repository of the Hugging Face hub; a file is downloaded into the hub's cache when first
    asked for.

    All files come from the commit that the first one resolved to, so a push in between cannot mix two
    versions.
    """

    repo_id: str
    revision: str | None = None
    commit: str | None = field(default=None, init=False)
    _absent: set[str] = field(default_factory=set, init=False)

    @property
    def label(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"

    def path(self, name: str) -> Path | None:
        """Download the file, or take it from the cache; None when the repository has no such file.

        Raises CheckpointError when the repository or revision does not exist, access is denied or the hub
        cannot be reached and the file is not cached.
        """
        if name in self._absent:
            return None
        try:
            path = Path(
                huggingface_hub.hf_hub_download(
                    repo_id=self.repo_id, filename=name, revision=self.commit or self.revision
                )
            )
        except LocalEntryNotFoundError as error:
            if constants.HF_HUB_OFFLINE and self.commit is not None:
                return None  # asked to stay offline: an optional file that was never cached looks like this
            raise CheckpointError(
                f"{self.label}: {name} is not cached and the hub cannot be reached"
            ) from error
        except EntryNotFoundError:
            self._absent.add(name)
            return None
        except RevisionNotFoundError as error:
            raise CheckpointError(f"{self.label}: the repository has no such revision") from error
        except GatedRepoError as error:
            raise CheckpointError(
                f"{self.label}: access is restricted; accept its terms on the hub, then `hf auth login`"
            ) from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise CheckpointError(
                f"{self.label}: neither a folder here nor a hub repository that you can read"
            ) from error
        except CLIENT_ERRORS as error:
            raise CheckpointError(f"{self.label}: {name} could not be downloaded: {error}") from error
        self.commit = self.commit or _commit_of(path)
        return path

    def remote_tensors(self, name: str) -> Mapping[str, TensorEntry] | None:
        """Dtypes and shapes in a safetensors file that is not downloaded yet, from its header alone.

        Returns None when the file is in the cache or lightgptq is asked to stay offline: then ``path``
        serves.
        """
        revision = self.commit or self.revision
        cached = huggingface_hub.try_to_load_from_cache(self.repo_id, name, revision=revision)
        if isinstance(cached, str) or constants.HF_HUB_OFFLINE:
            return None
        try:
            found = huggingface_hub.parse_safetensors_file_metadata(self.repo_id, name, revision=revision)
        except CLIENT_ERRORS as error:
            raise CheckpointError(f"{self.label}: the header of {name} could not be read: {error}") from error
        return {
            tensor: parse_entry(f"{self.label}/{name}", tensor, vars(info), 0)
            for tensor, info in found.tensors.items()
        }

    def identity(self) -> dict[str, Any]:
        """The repository and the commit its files come from."""
        return {"repo_id": self.repo_id, "commit": self.commit}


def open_source(name: str | Path, revision: str | None = None) -> FileSource:
    """A folder if ``name`` is one, else a hub repository.

    Raises CheckpointError when ``name`` is a file, or clearly a path that does not exist.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return LocalFolder(path)
    if path.exists():
        raise CheckpointError(f"{name}: is a file; give the folder that holds config.json and the weights")
    text = str(name)
    if text.startswith(("/", ".", "~")) or text.count("/") > 1 or not text:
        raise CheckpointError(f"{name}: no such folder; give an existing one or a hub name such as org/model")
    return HubRepo(text, revision)


def read_json(source: FileSource, name: str) -> dict[str, Any] | None:
    """A JSON object from the source, or None when there is no such file; CheckpointError for others."""
    path = source.path(name)
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def companion_files(source: FileSource, config: dict[str, Any]) -> dict[str, Path]:
    """Files to carry along with a model, by name: tokenizer, templates, generation defaults, licence, its
    own code.

    Code files are those that ``auto_map`` of the config names; they are copied, never run.
    """
    names = [*COMPANION_NAMES, *LICENCE_NAMES, *_code_files(config)]
    found = {name: source.path(name) for name in names}
    return {name: path for name, path in found.items() if path is not None}


def _code_files(config: dict[str, Any]) -> list[str]:
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict):
        return []
    listed = [value if isinstance(value, list) else [value] for value in auto_map.values()]
    classes = [one for values in listed for one in values if isinstance(one, str) and "--" not in one]
    modules = {one.rpartition(".")[0] for one in classes}
    return sorted(f"{module}.py" for module in modules if module.isidentifier())


def _commit_of(path: Path) -> str | None:
    """The commit in a cache path ``.../snapshots/COMMIT/name``, or None for another layout."""
    parts = path.parts
    index = parts.index("snapshots") if "snapshots" in parts else -1
    return parts[index + 1] if 0 <= index < len(parts) - 2 else None
