"""Every exception that lightgptq raises on purpose.

::

    LightGPTQError
    ├── UsageError                 an argument, rule or combination that makes no sense (also a ValueError)
    ├── CheckpointError            a file is missing, truncated, malformed or contradicts its config
    ├── UnsupportedModelError      no decoder blocks or linear layers could be discovered
    ├── CalibrationError           the calibration or evaluation text cannot serve
    ├── QuantizationError          a module could not be solved as asked (``--strict``), NaN in activations
    ├── ResumeError                a half-finished or finished output belongs to another command or source
    ├── DeviceMemoryError          a GPU ran out of memory
    ├── HubError                   the hub refused an upload or could not be reached
    ├── NativeLibraryError         the native library refused its arguments or has the wrong ABI
    └── MissingDependencyError     an optional package is needed for what was asked (also an ImportError)

Messages say what was given, what is allowed and what to do, in one sentence or two.
"""

from __future__ import annotations


class LightGPTQError(Exception):
    """Base of all errors that lightgptq raises on purpose."""


class UsageError(LightGPTQError, ValueError):
    """An argument, rule or combination of them that makes no sense."""


class CheckpointError(LightGPTQError):
    """A checkpoint file is missing, truncated, malformed or contradicts its config."""


class UnsupportedModelError(LightGPTQError):
    """No decoder blocks or linear layers could be discovered in the model."""


class CalibrationError(LightGPTQError):
    """The calibration or evaluation text cannot serve."""


class QuantizationError(LightGPTQError):
    """A module could not be solved as asked."""


class ResumeError(LightGPTQError):
    """A half-finished or finished output belongs to another command or source."""


class DeviceMemoryError(LightGPTQError):
    """A GPU ran out of memory."""


class HubError(LightGPTQError):
    """The hub refused an upload or could not be reached."""


class NativeLibraryError(LightGPTQError):
    """The native library refused its arguments or has the wrong ABI."""


class MissingDependencyError(LightGPTQError, ImportError):
    """An optional package is needed for what was asked."""
