"""Where calibration and evaluation texts come from: Python's own documentation, files, hub datasets.

A text is named by a *specification*:

``pydoc``           the prose of CPython's ``pydoc_data.topics``, half a megabyte of English that comes with Python: its
                    first half calibrates, its second half evaluates; no character serves both, though Python has
                    some passages under several topics: a sixth of the second half's text is in the first, too
``FILE.txt``        one document
``FILE.jsonl``      one JSON object a line, with the document under ``text`` (or ``content``)
``NAME[:CONFIG][@SPLIT]``  a dataset on the Hugging Face hub, read with the ``datasets`` package (an extra)
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightgptq.errors import CalibrationError, MissingDependencyError

Purpose = Literal["calibration", "evaluation"]

# A calibration set of 128 x 2048 tokens is about 1 MB of text; reading far past it only costs time.
HUB_CHARACTERS = 20_000_000


@dataclass(frozen=True)
class Text:
    """Documents of one source, joined by blank lines where a single stream is needed.

    name    what the user asked for, without the folder of a local file
    documents  non-empty strings
    """

    name: str
    documents: tuple[str, ...]

    def joined(self) -> str:
        """All documents as one string, separated by blank lines."""
        return "\n\n".join(self.documents)

    def sha256(self) -> str:
        """Digest of the joined text, to tell two calibration sets apart."""
        return hashlib.sha256(self.joined().encode()).hexdigest()


def load_text(spec: str, purpose: Purpose) -> Text:
    """The text that ``spec`` names (see the module's description).

    ``purpose`` decides which half of ``pydoc`` is meant; every other source is taken whole.
    Raises CalibrationError when the source is missing, empty or malformed.
    """
    if spec == "pydoc":
        return _pydoc(purpose)
    path = Path(spec).expanduser()
    if path.is_file():
        documents = _jsonl(path) if path.suffix in (".jsonl", ".json") else (_read(path),)
        documents = tuple(d for d in documents if d.strip())
        if not documents:
            raise CalibrationError(f"{path} holds no text")
        return Text(path.name, documents)
    if path.suffix in (".txt", ".jsonl", ".json", ".md") or path.is_absolute() or spec.startswith("."):
        raise CalibrationError(
            f"text file {spec} does not exist; give pydoc, a .txt or .jsonl file, or a hub dataset"
        )
    return _hub_dataset(spec)


def _pydoc(purpose: Purpose) -> Text:
    topics = importlib.import_module("pydoc_data.topics").topics
    joined = "\n\n".join(topics[name].strip() for name in sorted(topics))
    middle = len(joined) // 2
    half = joined[:middle] if purpose == "calibration" else joined[middle:]
    return Text("pydoc", (half,))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}") from error


def _jsonl(path: Path) -> tuple[str, ...]:
    documents = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path} line {number} is not JSON: {error.msg}") from error
        text = record if isinstance(record, str) else None
        if isinstance(record, dict):
            text = record.get("text", record.get("content"))
        if not isinstance(text, str):
            raise CalibrationError(f'{path} line {number} has no string under "text" or "content"')
        documents.append(text)
    return tuple(documents)


def _hub_dataset(spec: str) -> Text:
    match = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@(\w+))?", spec)
    if match is None:
        raise CalibrationError(
            f"{spec!r} is neither pydoc, nor a file that exists, nor NAME[:CONFIG][@SPLIT] of a hub dataset"
        )
    if importlib.util.find_spec("datasets") is None:
        raise MissingDependencyError(
            f"no file is called {spec}; to read it as a hub dataset install the extra: "
            "pip install 'lightgptq[datasets]'"
        )
    datasets = importlib.import_module("datasets")
    name, config, split = match.group(1), match.group(2), match.group(3) or "train"
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        documents, characters = [], 0
        for row in rows:
            text = row.get("text", row.get("content"))
            if not isinstance(text, str):
                raise CalibrationError(f'dataset {spec} has no string column "text" or "content"')
            if text.strip():
                documents.append(text)
                characters += len(text)
            if characters >= HUB_CHARACTERS:
                break
    except (OSError, ValueError) as error:
        raise CalibrationError(f"cannot read dataset {spec}: {error}") from error
    if not documents:
        raise CalibrationError(f"dataset {spec} holds no text")
    return Text(spec, tuple(documents))
