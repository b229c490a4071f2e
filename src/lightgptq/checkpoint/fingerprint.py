"""What identifies a source checkpoint, so that a resumed run never mixes two of them."""

from __future__ import annotations

from typing import Any

_WORDS = {"size": "size", "mtime_ns": "modification time", "sha256": "header"}


def fingerprint_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """One sentence that says what differs between two fingerprints of a source, or None when they agree."""
    for key, word in (("repo_id", "repository"), ("commit", "commit"), ("config_sha256", "config.json")):
        old, new = before.get(key), now.get(key)
        if old != new:
            if key == "config_sha256":
                return "config.json of the source has changed."
            return f"The source's {word} was {old} and is now {new}."
    old_files, new_files = before.get("files", {}), now.get("files", {})
    for name in sorted(old_files.keys() | new_files.keys()):
        if name not in new_files:
            return f"The source no longer has {name}."
        if name not in old_files:
            return f"The source now also has {name}."
        for key, word in _WORDS.items():
            old, new = old_files[name].get(key), new_files[name].get(key)
            if old != new:
                return f"The {word} of {name} in the source was {old} and is now {new}."
    return None
