"""GPTQ for any Hugging Face Transformers language model.

>>> import lightgptq
>>> report = lightgptq.quantize("path/to/model", "out", lightgptq.QuantScheme(bits=4))  # doctest: +SKIP
>>> model = lightgptq.load("out")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightgptq.version import __version__

if TYPE_CHECKING:
    from lightgptq.checkpoint.conversion import export_compressed_tensors, import_compressed_tensors
    from lightgptq.checkpoint.gguf import export_gguf
    from lightgptq.core.presets import preset
    from lightgptq.core.scheme import QuantScheme
    from lightgptq.errors import LightGPTQError
    from lightgptq.evaluation.comparison import Comparison, compare
    from lightgptq.evaluation.result import EvalResult, evaluate
    from lightgptq.hf import load
    from lightgptq.hub.card import model_card
    from lightgptq.hub.push import push_to_hub
    from lightgptq.linear import QuantLinear
    from lightgptq.loading.registration import register, unregister
    from lightgptq.quantization.calibration import CalibrationSet
    from lightgptq.quantization.job import quantize
    from lightgptq.quantization.report import QuantReport
    from lightgptq.rotation.job import rotate
    from lightgptq.rotation.run import RotationReport

__all__ = [
    "CalibrationSet",
    "Comparison",
    "EvalResult",
    "LightGPTQError",
    "QuantLinear",
    "QuantReport",
    "QuantScheme",
    "RotationReport",
    "__version__",
    "compare",
    "evaluate",
    "export_compressed_tensors",
    "export_gguf",
    "import_compressed_tensors",
    "load",
    "model_card",
    "preset",
    "push_to_hub",
    "quantize",
    "register",
    "rotate",
    "unregister",
]

# Where each public name is defined. They are imported at first use, since torch and Transformers take seconds.
_HOMES = {
    "CalibrationSet": "lightgptq.quantization.calibration",
    "Comparison": "lightgptq.evaluation.comparison",
    "EvalResult": "lightgptq.evaluation.result",
    "LightGPTQError": "lightgptq.errors",
    "QuantLinear": "lightgptq.linear",
    "QuantReport": "lightgptq.quantization.report",
    "QuantScheme": "lightgptq.core.scheme",
    "RotationReport": "lightgptq.rotation.run",
    "compare": "lightgptq.evaluation.comparison",
    "evaluate": "lightgptq.evaluation.result",
    "export_compressed_tensors": "lightgptq.checkpoint.conversion",
    "export_gguf": "lightgptq.checkpoint.gguf",
    "import_compressed_tensors": "lightgptq.checkpoint.conversion",
    "load": "lightgptq.hf",
    "model_card": "lightgptq.hub.card",
    "preset": "lightgptq.core.presets",
    "push_to_hub": "lightgptq.hub.push",
    "quantize": "lightgptq.quantization.job",
    "register": "lightgptq.loading.registration",
    "rotate": "lightgptq.rotation.job",
    "unregister": "lightgptq.loading.registration",
}


if not TYPE_CHECKING:  # for which every name would exist

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
