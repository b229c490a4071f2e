"""A stand-in of the hub that the client libraries take for the real one, and a checkpoint to push."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from tests.hub_standin import Hub, serve

import lightgptq
from lightgptq import CalibrationSet, QuantScheme

DEFAULT = "https://huggingface.co"


@pytest.fixture(autouse=True)
def _tiny_models_on_one_thread(one_thread: None) -> None:
    pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in at the address where the libraries look for the hub, with an empty cache and no stored token.

    Uploads go by git-LFS: hf_xet's own protocol has no stand-in.
    """
    constants = huggingface_hub.constants
    with serve(Hub()) as standin:
        monkeypatch.setattr(constants, "ENDPOINT", standin.endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(DEFAULT, standin.endpoint)
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", standin.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield standin


@pytest.fixture
def checkpoint(model_folder: Callable[[str], Path], windows: CalibrationSet, tmp_path: Path) -> Path:
    """A Llama in shards of 40 kB: mixed bits, one linear not quantized."""
    out = tmp_path / "checkpoint"
    rules = (r".*down_proj=bits:8", r".*layers\.1\.self_attn\.o_proj=skip")
    lightgptq.quantize(
        model_folder("llama"),
        out,
        QuantScheme(group_size=32),
        calibration=windows,
        rules=rules,
        max_shard_bytes=40_000,
    )
    return out
