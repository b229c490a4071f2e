"""GPTQ for any Hugging Face Transformers language model.

>>> import lightgptq
>>> report = lightgptq.quantize("path/to/model", "out", lightgptq.QuantScheme(bits=4))  # doctest: +SKIP
>>> model = lightgptq.load("out")  # doctest: +SKIP
"""

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
from lightgptq.version import __version__

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
