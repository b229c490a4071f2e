"""AutoGPTQ's interface over lightgptq's, so that its users' programs run after one changed import.

    from lightgptq.autogptq import AutoGPTQForCausalLM, BaseQuantizeConfig

Names, arguments and defaults are those of AutoGPTQ 0.7. An argument that chose among its kernels or steered its loops
has no meaning here: it is accepted, and warned of once by name when it asks for something. What cannot be done is an
error. The differences that remain are listed in ``docs/migration-autogptq.md``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightgptq.checkpoint.config import GPTQCheckpointConfig
from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.companions import load_config, window_length
from lightgptq.core.scheme import QuantScheme
from lightgptq.errors import CheckpointError, UsageError
from lightgptq.hf import load
from lightgptq.hub.push import PushResult, push_to_hub
from lightgptq.once import warn_once
from lightgptq.quantization.examples import windows_of_examples
from lightgptq.quantization.job import quantize
from lightgptq.version import __version__

CONFIG_FILE = "quantize_config.json"
# Arguments without a meaning here and the values that ask for nothing.
WITHOUT_MEANING: dict[str, tuple[Any, ...]] = {
    "autotune_warmup_after_quantized": (False,),
    "batch_size": (1,),
    "cache_dir": (None,),
    "cache_examples_on_gpu": (True,),
    "disable_exllama": (None,),
    "disable_exllamav2": (False,),
    "force_download": (False,),
    "inject_fused_attention": (False,),
    "inject_fused_mlp": (False,),
    "local_files_only": (False,),
    "low_cpu_mem_usage": (False, True),
    "max_memory": (None,),
    "model_basename": (None,),
    "proxies": (None,),
    "quantize_config": (None,),
    "resume_download": (False,),
    "safetensors_metadata": (None,),
    "token": (None,),
    "trainable": (False, True),
    "true_sequential": (True,),
    "use_auth_token": (None,),
    "use_cuda_fp16": (True,),
    "use_marlin": (False,),
    "use_qigen": (False,),
    "use_safetensors": (True,),
    "use_triton": (False,),
    "use_tritonv2": (False,),
    "warmup_triton": (False,),
}


@dataclass
class BaseQuantizeConfig:
    """How to quantize; the fields and defaults are AutoGPTQ's.

    Raises UsageError (a ValueError) for a value that is not allowed.
    """

    bits: int = 4
    group_size: int = -1
    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    is_marlin_format: bool = False
    quant_method: str = "gptq"
    checkpoint_format: str = "gptq"
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None

    def __post_init__(self) -> None:
        if self.is_marlin_format or self.quant_method != "gptq" or self.checkpoint_format == "marlin":
            raise UsageError(
                "only quant_method='gptq' with checkpoint_format 'gptq' or 'gptq_v2' is supported; convert other "
                "checkpoints with the tool that wrote them"
            )
        self.scheme()

    def scheme(self) -> QuantScheme:
        """The same in lightgptq's terms."""
        return QuantScheme(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            damp=self.damp_percent,
            act_order=self.desc_act,
            static_groups=self.static_groups,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "is_marlin_format"}

    def save_pretrained(self, save_dir: str | Path, **_: Any) -> None:
        """Write ``quantize_config.json`` into a folder."""
        path = Path(save_dir) / CONFIG_FILE
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, save_dir: str | Path, revision: str | None = None) -> BaseQuantizeConfig:
        """What a checkpoint in a folder or on the hub says about itself; CheckpointError when it says nothing."""
        config = CheckpointReader.open(save_dir, revision).quantization_config()
        if config is None:
            raise CheckpointError(f"{save_dir}: no quantization_config; this is no GPTQ checkpoint")
        return cls._of(config)

    @classmethod
    def _of(cls, config: GPTQCheckpointConfig) -> BaseQuantizeConfig:
        return cls(
            bits=config.bits,
            group_size=config.group_size,
            damp_percent=config.damp_percent,
            desc_act=config.desc_act,
            static_groups=config.static_groups,
            sym=config.sym,
            true_sequential=config.true_sequential,
            checkpoint_format=config.checkpoint_format,
        )


class BaseGPTQForCausalLM:
    """A model to be quantized, or a quantized one; attributes that it lacks are the Transformers model's.

    The model is loaded when it is first needed: quantizing streams the original from its files and never holds it.
    """

    def __init__(
        self,
        name: str | Path,
        quantize_config: BaseQuantizeConfig,
        *,
        quantized: bool,
        options: Mapping[str, Any],
    ) -> None:
        self._name, self._quantized, self._options = name, quantized, dict(options)
        self.quantize_config = quantize_config
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._model: PreTrainedModel | None = None

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantized."""
        return self._quantized

    @property
    def model(self) -> PreTrainedModel:
        """The Transformers model: the original before `quantize`, the quantized one after."""
        if self._model is None:
            self._model = load(self._name, **self._options)
        return self._model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while being copied or unpickled there is no model to ask yet
            raise AttributeError(name)
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.model(*args, **kwargs)

    def to(self, device: str | torch.device) -> BaseGPTQForCausalLM:
        """Move the model."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """The model's ``generate``, without gradients."""
        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def quantize(
        self,
        examples: Sequence[Mapping[str, Any]],
        batch_size: int = 1,
        use_triton: bool = False,
        use_cuda_fp16: bool = True,
        autotune_warmup_after_quantized: bool = False,
        cache_examples_on_gpu: bool = True,
    ) -> None:
        """Quantize with examples that a tokenizer made: mappings with ``input_ids`` and ``attention_mask``.

        Examples of different lengths are joined and cut into windows of equal length, see `windows_of_examples`. The
        result waits in a temporary folder until `save_quantized`. Raises UsageError when it is quantized already.
        """
        _warn_of(
            batch_size=batch_size,
            use_triton=use_triton,
            use_cuda_fp16=use_cuda_fp16,
            autotune_warmup_after_quantized=autotune_warmup_after_quantized,
            cache_examples_on_gpu=cache_examples_on_gpu,
            true_sequential=self.quantize_config.true_sequential,
        )
        if self._quantized:
            raise UsageError(f"{self._name} is quantized already; give the original model")
        options = {name: self._options[name] for name in ("device", "revision", "trust_remote_code")}
        reader = CheckpointReader.open(self._name, options["revision"])
        longest = window_length(load_config(reader, trust_remote_code=options["trust_remote_code"]), None)
        folder = tempfile.TemporaryDirectory(prefix="lightgptq-")
        out = Path(folder.name) / "checkpoint"
        dtype = self._options["dtype"]
        quantize(
            self._name,
            out,
            self.quantize_config.scheme(),
            calibration=windows_of_examples(examples, longest=longest),
            checkpoint_format=self.quantize_config.checkpoint_format,
            dtype="auto" if dtype == "auto" else str(dtype).removeprefix("torch."),
            **options,
        )
        self._folder, self._name, self._model, self._quantized = folder, out, None, True
        self._options["revision"] = None

    def save_quantized(
        self,
        save_dir: str | Path,
        use_safetensors: bool = True,
        safetensors_metadata: dict[str, str] | None = None,
    ) -> None:
        """Write the checkpoint to a folder, as safetensors; files of the same names there are replaced."""
        _warn_of(use_safetensors=use_safetensors, safetensors_metadata=safetensors_metadata)
        if not self._quantized:
            raise UsageError("the model is not quantized; call quantize(examples) first")
        if self._folder is not None:
            shutil.copytree(self._name, save_dir, dirs_exist_ok=True)
            return
        self.model.save_pretrained(save_dir)
        raw = json.loads((Path(save_dir) / "config.json").read_text(encoding="utf-8"))
        text = json.dumps(raw["quantization_config"], indent=2) + "\n"
        (Path(save_dir) / CONFIG_FILE).write_text(text, encoding="utf-8")

    def save_pretrained(self, save_dir: str | Path, **options: Any) -> None:
        """Another name of `save_quantized`."""
        self.save_quantized(save_dir, **options)

    def push_to_hub(
        self,
        repo_id: str,
        save_dir: str | Path | None = None,
        use_safetensors: bool = True,
        safetensors_metadata: dict[str, str] | None = None,
        commit_message: str = f"GPTQ checkpoint by lightgptq {__version__}",
        use_auth_token: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> PushResult:
        """Save to ``save_dir``, or a temporary folder, and upload it with a model card; see `lightgptq.push_to_hub`."""
        if create_pr:
            raise UsageError(
                "create_pr is not supported; push to a branch: lightgptq.push_to_hub(..., revision=NAME)"
            )
        with tempfile.TemporaryDirectory(prefix="lightgptq-") as temporary:
            folder = Path(save_dir or temporary)
            self.save_quantized(folder, use_safetensors, safetensors_metadata)
            return push_to_hub(
                folder,
                repo_id,
                private=bool(private),
                token=token or use_auth_token,
                commit_message=commit_message,
            )


class AutoGPTQForCausalLM:
    """Where programs for AutoGPTQ start."""

    def __init__(self) -> None:
        raise UsageError("use AutoGPTQForCausalLM.from_pretrained (to quantize) or .from_quantized (to run)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig,
        max_memory: Mapping[Any, Any] | None = None,
        trust_remote_code: bool = False,
        **model_init_kwargs: Any,
    ) -> BaseGPTQForCausalLM:
        """A model from a folder or the hub, to be quantized; its weights are not read yet.

        ``torch_dtype`` (or ``dtype``), ``device_map`` and ``revision`` are understood among the other arguments.
        """
        options = _options(model_init_kwargs, trust_remote_code, max_memory=max_memory)
        CheckpointReader.open(pretrained_model_name_or_path, options["revision"])
        return BaseGPTQForCausalLM(
            pretrained_model_name_or_path, quantize_config, quantized=False, options=options
        )

    @classmethod
    def from_quantized(
        cls,
        model_name_or_path: str | Path,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[Any, Any] | None = None,
        device: str | int | torch.device | None = None,
        low_cpu_mem_usage: bool = False,
        use_triton: bool = False,
        inject_fused_attention: bool = False,
        inject_fused_mlp: bool = False,
        use_cuda_fp16: bool = True,
        quantize_config: BaseQuantizeConfig | None = None,
        model_basename: str | None = None,
        use_safetensors: bool = True,
        trust_remote_code: bool = False,
        warmup_triton: bool = False,
        trainable: bool = False,
        disable_exllama: bool | None = None,
        disable_exllamav2: bool = False,
        use_marlin: bool = False,
        use_tritonv2: bool = False,
        **kwargs: Any,
    ) -> BaseGPTQForCausalLM:
        """Load a GPTQ checkpoint of any tool, from a folder or the hub; the config and the file's name are found.

        device, device_map  where the model goes; default a GPU if there is one
        Adapters can be trained on it whether ``trainable`` is given or not.
        """
        passed = dict(locals())
        own = {name: passed[name] for name in WITHOUT_MEANING if name in passed}
        if device is not None:
            kwargs["device"] = device
        options = _options({"device_map": device_map, **kwargs}, trust_remote_code, **own)
        config = BaseQuantizeConfig.from_pretrained(model_name_or_path, options["revision"])
        found = BaseGPTQForCausalLM(model_name_or_path, config, quantized=True, options=options)
        found.model.eval()
        return found


def _options(given: Mapping[str, Any], trust_remote_code: bool, **others: Any) -> dict[str, Any]:
    """Arguments of `load` out of AutoGPTQ's; warns of those without a meaning, refuses unknown ones."""
    rest = dict(given)
    dtype = rest.pop("torch_dtype", None)
    dtype = rest.pop("dtype", None) or dtype or "auto"
    device_map, device = rest.pop("device_map", None), rest.pop("device", None)
    options = {
        "dtype": dtype,
        "device": _device(device, device_map),
        "revision": rest.pop("revision", None),
        "trust_remote_code": trust_remote_code,
    }
    unknown = sorted(set(rest) - set(WITHOUT_MEANING))
    if unknown:
        raise UsageError(
            f"unknown argument {unknown[0]!r}; AutoGPTQ's own arguments and revision are understood"
        )
    _warn_of(**others, **rest)
    return options


def _device(device: Any, device_map: str | Mapping[str, Any] | None) -> str:
    """One device: as given, or the only one of a map."""
    if device is None and device_map is not None:
        places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
        if len(places) > 1:
            raise UsageError(
                "a model on several devices is loaded by Transformers: call lightgptq.register(), then "
                "AutoModelForCausalLM.from_pretrained(..., device_map=...)"
            )
        device = places.pop()
    if device in (None, "auto", "balanced", "balanced_low_0", "sequential"):
        return "auto"
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _warn_of(**arguments: Any) -> None:
    """Say once of each argument without a meaning that it changes nothing."""
    for name, value in arguments.items():
        if value not in WITHOUT_MEANING[name]:
            warn_once(f"{name} has no meaning in lightgptq and changes nothing; it can be left out")
