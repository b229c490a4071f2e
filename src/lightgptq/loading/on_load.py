"""Quantization while loading: ``from_pretrained(original, quantization_config=GPTQConfig(...))``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.companions import load_tokenizer, window_length
from lightgptq.core.presets import order_fields
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import CheckpointError, UsageError
from lightgptq.hf import fill_meta, insert_quant_linears
from lightgptq.loading.config import GPTQConfig
from lightgptq.once import warn_once
from lightgptq.ops import MODES
from lightgptq.quantization.calibration import CalibrationSet
from lightgptq.quantization.examples import windows_of_examples
from lightgptq.quantization.job import quantize
from lightgptq.sources import find_sources
from lightgptq.texts import Text, load_text

# What Transformers' documentation calls these data sets, in our terms (see `texts`).
DATASETS = {
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1@train",
    "c4": "allenai/c4:en@train",
    "c4-new": "allenai/c4:en@train",
}
SAMPLES = 128
# Fields of GPTQConfig that steer another tool's code, with the values that ask for nothing.
WITHOUT_MEANING: dict[str, tuple[Any, ...]] = {
    "true_sequential": (True,),
    "block_name_to_quantize": (None,),
    "module_name_preceding_first_block": (None,),
    "batch_size": (1,),
    "pad_token_id": (None,),
    "max_input_length": (None,),
    "cache_block_outputs": (True,),
}


def quantize_loaded(model: PreTrainedModel, asked: Any, source: Path) -> GPTQConfig:
    """Quantize the checkpoint in ``source``, of which ``model`` was loaded, and put the result into ``model``.

    asked   a ``transformers.GPTQConfig``
    source  folder of the original; its weights are streamed again, block by block

    Returns what a checkpoint saved from ``model`` says about itself. Raises UsageError or CalibrationError for what
    cannot be done.
    """
    if not (source / "config.json").is_file():
        raise CheckpointError(
            f"{source}: no config.json beside the weights; give a whole checkpoint to quantize"
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise UsageError(
            f"quantizing while loading needs the model on one device, not on {', '.join(sorted(map(str, devices)))}; "
            "quantize it first, then load the checkpoint with any device_map"
        )
    with tempfile.TemporaryDirectory(prefix="lightgptq-") as folder:
        out = Path(folder) / "checkpoint"
        quantize(
            source,
            out,
            scheme_of(asked),
            calibration=_windows(asked, model, source),
            rules=_rules(asked.modules_in_block_to_quantize),
            checkpoint_format=asked.format,
            trust_remote_code=model.is_remote_code(),
        )
        reader = CheckpointReader.open(out)
        config = GPTQConfig(**reader.config["quantization_config"], backend=asked.backend)
        insert_quant_linears(model, reader, config.checkpoint, mode_of(config.backend))
        fill_meta(model, reader, find_sources(model, reader.names()), model.dtype, devices.pop())
    return config


def mode_of(backend: str | None) -> str:
    """The arithmetic that ``GPTQConfig(backend=...)`` asks for; other tools' kernel names change nothing."""
    if backend in MODES:
        return str(backend)
    if backend not in (None, "auto", "auto_trainable"):
        warn_once(
            f"GPTQConfig(backend={backend!r}) names a kernel of another tool and changes nothing; "
            f"lightgptq knows auto, {', '.join(MODES)}"
        )
    return "exact"


def scheme_of(asked: transformers.GPTQConfig) -> QuantScheme:
    """The scheme that a ``transformers.GPTQConfig`` describes; fields that change nothing here warn once by name.

    ``desc_act`` is act-order with permuted groups, ``act_group_aware`` act-order that keeps groups of neighbours, as
    presets do.
    """
    for name, idle in WITHOUT_MEANING.items():
        value = getattr(asked, name, None)
        if value is not None and value not in idle:
            warn_once(f"GPTQConfig({name}={value!r}) has no meaning in lightgptq and changes nothing")
    grouped = bool(getattr(asked, "act_group_aware", True)) and not asked.desc_act
    order = {"act_order": bool(asked.desc_act), "static_groups": False}
    scheme = QuantScheme(bits=asked.bits, group_size=asked.group_size, sym=asked.sym, damp=asked.damp_percent)
    return scheme.with_overrides(order_fields(asked.bits) if grouped else order)


def _windows(asked: transformers.GPTQConfig, model: PreTrainedModel, source: Path) -> CalibrationSet:
    """The calibration set: texts given as strings one by one, a named data set, or pydoc when there is none."""
    tokenizer = asked.tokenizer
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer or source)
    longest = window_length(model.config, asked.model_seqlen)
    dataset = asked.dataset
    if isinstance(dataset, list):
        if not all(isinstance(document, str) for document in dataset):
            raise UsageError("GPTQConfig(dataset=...) must be a list of strings, or wikitext2, c4 or c4-new")
        return windows_of_examples(
            [tokenizer(d)["input_ids"] for d in dataset], longest=longest, source="dataset"
        )
    text: Text = load_text(DATASETS.get(dataset, dataset) if dataset else "pydoc", "calibration")
    return CalibrationSet.build(text, tokenizer, samples=SAMPLES, seq_len=longest)


def _rules(modules: list[list[str]] | list[str] | None) -> tuple[str, ...]:
    """A rule that skips every linear of a block that is not among the listed ones."""
    if not modules:
        return ()
    names = [name for step in modules for name in ([step] if isinstance(step, str) else step)]
    listed = "|".join(name.replace(".", r"\.") for name in names)
    return (rf"(?!.*\.(?:{listed})$)=skip",)
