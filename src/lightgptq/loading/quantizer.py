"""Transformers' hook for a quantization method: how ``from_pretrained`` builds and fills a GPTQ model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightgptq.checkpoint.reader import CheckpointReader
from lightgptq.decoding import use_native
from lightgptq.errors import CheckpointError, UsageError
from lightgptq.hf import insert_quant_linears
from lightgptq.layouts import ExpertLinears
from lightgptq.linear import QuantLinear
from lightgptq.loading.config import GPTQConfig
from lightgptq.loading.on_load import mode_of, quantize_loaded
from lightgptq.sources import NameMap, find_sources


class LightGPTQQuantizer(HfQuantizer):
    """Puts a QuantLinear in the place of each linear that the checkpoint holds packed, and repacks it once loaded.

    An original (``from_pretrained(original, quantization_config=GPTQConfig(...))``) is quantized once it is loaded,
    when Transformers has left the contexts in which it builds models.
    """

    requires_calibration = False

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._source = Path()
        self._file_name_given = False

    def update_attn_implementation(self, config: Any) -> Any:
        """The first hook that sees the model's config: names the weight file of AutoGPTQ's folders, which
        Transformers would not find."""
        folder = Path(str(getattr(config, "_name_or_path", "") or ""))
        usual = ("model.safetensors", "model.safetensors.index.json")
        if folder.is_dir() and not any((folder / name).is_file() for name in usual):
            found = sorted(path.name for path in folder.glob("gptq_model-*.safetensors"))
            if len(found) == 1 and getattr(config, "transformers_weights", None) is None:
                config.transformers_weights = found[0]
                self._file_name_given = True
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if not checkpoint_files:
            raise UsageError(
                "a GPTQ model is loaded from the files of its checkpoint; give from_pretrained a folder or a hub name, "
                "not a state_dict"
            )
        self._source = Path(checkpoint_files[0]).parent
        if not self.pre_quantized:
            return model
        assert isinstance(self.quantization_config, GPTQConfig)
        reader = CheckpointReader.of_files(checkpoint_files)
        _leave_out_absent(reader, model)
        mode = mode_of(self.quantization_config.backend)
        with torch.device(
            "cpu"
        ):  # Transformers builds the model on meta, also what is read from files meanwhile
            names = insert_quant_linears(model, reader, self.quantization_config.checkpoint, mode)
            _check_packed(model, reader, names)
        _untie(model, names)
        for name in names:
            layer: Any = model.get_submodule(name)
            layer.weight = _nothing_to_initialise()
            if layer.bias is not None:
                layer.bias = layer.bias.to(model.dtype)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._file_name_given:
            del model.config.transformers_weights
        if not self.pre_quantized:
            self.quantization_config = quantize_loaded(model, self.quantization_config, self._source)
            model.config.quantization_config = self.quantization_config
        for name, layer in model.named_modules():
            if not isinstance(layer, QuantLinear):
                continue
            if layer.qweight is not None and layer.qweight.is_meta:
                raise UsageError(
                    f"{name} was offloaded to the disk, which packed weights cannot be; "
                    "load without offload_buffers=True"
                )
            layer.__dict__.pop("weight", None)
            layer.prepare()
        if model.device.type == "cpu":
            use_native(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        # Saving a model leaves its config's dtype as a string, which then comes here.
        chosen = dtype if isinstance(dtype, torch.dtype) else model.dtype
        for name, layer in list(model.named_modules()):
            if not isinstance(layer, QuantLinear):
                continue
            linear = nn.Linear(
                layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=chosen
            )
            linear.weight = nn.Parameter(layer.dequantize(chosen))
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.to(chosen))
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
        return model

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the packed tensors again, bit for bit."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through to adapters; the packed weights are constant."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The product is one op that ``torch.compile`` knows."""
        return True


def _nothing_to_initialise() -> torch.Tensor:
    """A stand-in for a linear's weight while Transformers fills what a checkpoint lacks.

    Some models initialise the weights of an attention layer's linears from outside (T5, GPT-2), but leave alone what is
    marked as filled.
    """
    weight = torch.empty(0)
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return weight


def _leave_out_absent(reader: CheckpointReader, model: PreTrainedModel) -> None:
    """Hide packed weights of modules that the model lacks when it is another class than the checkpoint's.

    ``AutoModel`` loads the body of a causal language model: what lies outside of it, such as a quantized head, is
    left out, as Transformers leaves out plain weights.
    """
    if type(model).__name__ in (model.config.architectures or []):
        return
    names, weights = NameMap(model), set(model.state_dict())
    for name in reader.names():
        written, _, leaf = name.rpartition(".")
        if leaf == "qweight" and names.renamed(f"{written}.weight", weights) is None:
            reader.leave_out(name)


def _untie(model: PreTrainedModel, names: list[str]) -> None:
    """A quantized head has a weight of its own, whatever the config says about tied embeddings."""
    quantized = {f"{name}.weight" for name in names}
    tied = {a: b for a, b in model.all_tied_weights_keys.items() if not {a, b} & quantized}
    if len(tied) != len(model.all_tied_weights_keys):
        model.all_tied_weights_keys = tied
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def _check_packed(model: PreTrainedModel, reader: CheckpointReader, names: list[str]) -> None:
    """Refuse what Transformers would let pass: it casts scales without a word and makes up tensors that are missing."""
    sources = find_sources(model, reader.names())
    for path, module in model.named_modules():
        if isinstance(module, ExpertLinears):
            for leaf in (leaf for leaf in module.state_dict() if leaf.endswith(".weight")):
                source = sources.get(f"{path}.{leaf}")
                if source is not None and source.names != (f"{path}.{leaf}",):
                    raise CheckpointError(
                        f"{reader.label}: {source.names[0]} is an unquantized expert beside quantized ones, which "
                        "Transformers would merge into a tensor of all experts; load it with lightgptq.load"
                    )
    for name in names:
        for leaf, slot in model.get_submodule(name).state_dict().items():
            source = sources.get(f"{name}.{leaf}")
            if source is None:
                raise CheckpointError(
                    f"{reader.label} does not hold {name}.{leaf}; the checkpoint is incomplete"
                )
            if source.shape(reader) != slot.shape or (leaf != "bias" and source.dtype(reader) != slot.dtype):
                raise CheckpointError(
                    f"{reader.label}: {source.names[0]} is {source.dtype(reader)} {source.shape(reader)}, "
                    f"the config asks for {slot.dtype} {tuple(slot.shape)}"
                )
