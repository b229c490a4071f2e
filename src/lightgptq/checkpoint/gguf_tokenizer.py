"""A Hugging Face ``tokenizer.json`` in the terms of llama.cpp's vocabulary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightgptq.errors import CheckpointError

# llama.cpp's token types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Splitting pattern before byte-pair merges -> the name under which llama.cpp implements it.
PATTERNS = {
    None: "gpt-2",
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to tokenize.

    model   "gpt2" (byte-level pairs) or "llama" (SentencePiece pairs with byte fallback)
    pre     name of the splitting pattern; "default" for "llama"
    tokens, types, scores  one of each per id; scores only for "llama"
    merges  pairs joined by a space, best first
    bos, eos  ids or None; add_bos whether a text starts with bos
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    bos: int | None
    eos: int | None
    add_bos: bool


def read_vocabulary(path: Path, config: dict[str, Any], pre: str | None = None) -> Vocabulary:
    """Read ``tokenizer.json``.

    config  the model's config.json, for vocab_size, bos_token_id and eos_token_id
    pre     llama.cpp's name of the splitting pattern, when the file's own is not among those known here

    Raises CheckpointError for a tokenizer that is no byte-pair encoding, or a splitting pattern without a
    name.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        model, vocab = raw["model"], dict(raw["model"]["vocab"])
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: no byte-pair tokenizer that llama.cpp could use ({error!r})"
        ) from error
    byte_level, pattern = _splitting(raw.get("pre_tokenizer"))
    if not byte_level and not model.get("byte_fallback"):
        raise CheckpointError(f"{path}: neither byte-level nor with byte fallback; llama.cpp cannot use it")
    if byte_level and pre is None:
        if pattern not in PATTERNS:
            raise CheckpointError(
                f"{path}: splits text by {pattern!r}, whose name in llama.cpp is not known here; give it "
                "(such as 'gpt-2', 'llama-bpe' or 'qwen2')"
            )
        pre = PATTERNS[pattern]
    size = max(int(config.get("vocab_size", 0)), len(vocab))
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    for token, number in vocab.items():
        tokens[number] = token
        types[number] = BYTE if not byte_level and _is_byte(token) else NORMAL
    for added in raw.get("added_tokens", []):
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    unknown = model.get("unk_token")
    if unknown in vocab:
        types[vocab[unknown]] = UNKNOWN
    return Vocabulary(
        model="gpt2" if byte_level else "llama",
        pre=pre if byte_level and pre is not None else "default",
        tokens=tokens,
        types=types,
        scores=[] if byte_level else [-float(number) for number in range(size)],
        merges=merges,
        bos=_one_id(config.get("bos_token_id")),
        eos=_one_id(config.get("eos_token_id")),
        add_bos=_adds_bos(raw.get("post_processor"), tokens, _one_id(config.get("bos_token_id"))),
    )


def _splitting(pre_tokenizer: Any) -> tuple[bool, str | None]:
    """Whether bytes are mapped to characters, and the pattern that splits text before (None: GPT-2's own)."""
    if not isinstance(pre_tokenizer, dict):
        return False, None
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    return byte_level, patterns[0] if patterns else None


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _one_id(value: Any) -> int | None:
    """An id, or the first of several; config.json allows both."""
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, int) else None


def _adds_bos(post_processor: Any, tokens: list[str], bos: int | None) -> bool:
    """Whether the tokenizer itself puts the beginning-of-text token in front."""
    if not isinstance(post_processor, dict) or bos is None or bos >= len(tokens):
        return False
    steps = post_processor.get("processors") or [post_processor]
    for step in steps:
        single = step.get("single") or []
        if single and single[0].get("SpecialToken", {}).get("id") == tokens[bos]:
            return True
    return False
