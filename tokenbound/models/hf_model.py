"""From tensors to the transformers model that a config names, every parameter accounted for."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from tokenbound.compression.tensor_map import header_of
from tokenbound.config.family import FAMILY
from tokenbound.errors import InputError
from tokenbound.limits import MAX_EXPERTS, MAX_LAYERS, require_size
from tokenbound.models.quantized.deployed import load_deployed
from tokenbound.models.quantized.schemes import (
    QUANTIZATION,
    RECORDS,
    require_package,
    scheme_of,
)
from tokenbound.models.smoothing_head import SMOOTHING
from tokenbound.models.sources import TensorSource
from tokenbound.models.special_floats import untag_floats

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.utils.loading_report import LoadStateDictInfo

logger = logging.getLogger(__name__)


def transposed_layers(blank: PreTrainedModel) -> Callable[[str], bool]:
    """Of a layer's name, whether it keeps its weight as [inputs, outputs], as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    layers = {name for name, module in blank.named_modules() if isinstance(module, Conv1D)}
    layers |= {name.removeprefix(f"{blank.base_model_prefix}.") for name in layers}
    return layers.__contains__


def _load(
    blank: PreTrainedModel, architecture: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    method = scheme_of(architecture)
    is_deployed = method is not None and method.package is not None
    if is_deployed:
        require_package(architecture)
    with _quiet_transformers():
        try:
            if method is not None and is_deployed:
                return load_deployed(blank, method, architecture, tensors, dtype)
            loaded: Any = type(blank).from_pretrained(
                None,
                config=blank.config,
                state_dict=dict(tensors),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come back in the report, and are refused by name
                local_files_only=True,
            )
            return cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)  # its annotation knows no pair
        except InputError:
            raise
        except (*_LOADING_ERRORS, *_DEPLOYED_ERRORS) as error:
            is_known = is_deployed or isinstance(error, _LOADING_ERRORS)
            if isinstance(error, torch.OutOfMemoryError) or not is_known:
                raise
            raise InputError(f"the tensors do not fit the architecture: {_one_line(error)}") from error


class Loader:
    """Loads tensors into a model a few at a time, each as `from_pretrained` would: renamed, joined, and cast.

    The model begins without storage. After `finish` it has all but what is loaded and dropped later.
    """

    def __init__(self, blank: PreTrainedModel, source: TensorSource, names: Collection[str], *, dtype: torch.dtype):
        """Find out where every tensor goes; reads none.

        Args:
            blank: the model on the meta device; not changed.
            source: its tensors.
            names: those of them that are the model's.
            dtype: arithmetic of the model body.

        Raises:
            InputError: tensors are missing, unknown or of another shape, by name.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        from transformers.modeling_utils import LoadStateDictConfig, local_torch_dtype

        self.source = source
        with _quiet_transformers(), torch.device("meta"), local_torch_dtype(dtype):
            self.model = type(blank)(copy.deepcopy(blank.config))
        self.model.eval()
        mapping = get_model_conversion_mapping(self.model)
        self._config = partial(
            LoadStateDictConfig,
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=cast(Any, mapping),  # its annotation knows no base class
            ignore_mismatched_sizes=True,
        )
        own, prefix = self.model.state_dict(), self.model.base_model_prefix
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.targets: dict[str, tuple[str, bool]] = {}
        """Of each tensor: the parameter or buffer that it becomes, and whether it does not become it alone."""
        for name in names:
            target, pattern = rename_source_key(name, renamings, converters, prefix, own)
            if target not in own and name in own:
                target, pattern = rename_source_key(name, [], [], prefix, own)
            self.targets[name] = (target, pattern is not None)
        self._tied = self._check(own)

    def _check(self, own: Mapping[str, torch.Tensor]) -> set[str]:
        """Load outlines of all tensors, which is quick, and refuse what does not fit. Returns names of tied weights."""
        outlines = {}
        for name, (target, _) in self.targets.items():
            shape = self.source.shape(name)
            like = own.get(target)
            outline = (tuple(like.shape) if like is not None else (0,)) if shape is None else shape
            outlines[name] = torch.empty(outline, dtype=self.source.dtype(name), device="meta")
        report = self._convert(outlines, torch.device("meta"))
        missing = set(report.missing_keys)
        self.model.mark_tied_weights_as_initialized(report)
        self.model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
        self.model._adjust_missing_and_unexpected_keys(report)
        _refuse_incomplete(report.to_dict())
        return missing - report.missing_keys

    def load(self, names: Collection[str], device: torch.device) -> None:
        """Load some tensors into the parameters that they become.

        Raises:
            InputError: one cannot be made.
        """
        self._convert({name: _Later(self.source, name) for name in names}, device)

    def finish(self, names: Collection[str], device: torch.device) -> None:
        """Load what stays, compute the buffers, and tie what is tied.

        Args:
            names: the tensors to load now.
            device: where they and the buffers go.

        Raises:
            InputError: a tensor cannot be made.
        """
        from transformers.utils.loading_report import LoadStateDictInfo

        self.load(names, device)
        report = LoadStateDictInfo(set(self._tied), set(), set(), [], {}, set())  # tied names alone are missing
        with _quiet_transformers():
            self.model._finalize_model_loading(self.model, self._config(device_map={"": device}), report)
        self.model.requires_grad_(False)

    def _convert(self, tensors: Mapping[str, Any], device: torch.device) -> LoadStateDictInfo:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with _quiet_transformers():
            try:
                config = self._config(device_map={"": device})
                found: LoadStateDictInfo
                found, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), config)
                return found
            except InputError:
                raise
            except _LOADING_ERRORS as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise InputError(f"the tensors do not fit the architecture: {_one_line(error)}") from error


class _Later:
    """A tensor that is made when transformers asks for it."""

    def __init__(self, source: TensorSource, name: str) -> None:
        self._source, self._name = source, name

    def __getitem__(self, index: object) -> torch.Tensor:
        return self._source.tensor(self._name, torch.device("cpu"))


_LOADING_ERRORS = (RuntimeError, ValueError, KeyError)


_DEPLOYED_ERRORS = (TypeError, AttributeError, AssertionError, IndexError, ImportError, NotImplementedError, re.error)
"""What the packages of quantizers raise besides, over configs and tensors that they did not write."""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hold back transformers' progress bars and tables: what they say is checked here and raised as errors."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def blank_model(architecture: Mapping[str, Any], num_tensors: int | None = None) -> PreTrainedModel:
    """The model without storage (meta device): names, shapes and ties only.

    Raises:
        InputError: the architecture defines no causal language model, or more layers than there are tensors.
    """
    config = _make_config(architecture)
    with _quiet_transformers():
        try:
            causal_class = _causal_class(config)
            config = _config_for(causal_class, config)
            layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
            if num_tensors is not None and isinstance(layers, int) and layers > num_tensors:
                raise InputError(f"the architecture has {layers} layers but only {num_tensors} tensors; fetch it again")
            _refuse_boundless(config.get_text_config())
            with torch.device("meta"):
                return causal_class(config)
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a config is data from elsewhere, and model code trips over it in any way
            raise InputError(_no_model(config, error)) from error


_LIMITED = {
    "num_hidden_layers": MAX_LAYERS,
    "num_experts": MAX_EXPERTS,
    "num_local_experts": MAX_EXPERTS,
    "n_routed_experts": MAX_EXPERTS,
}
"""Numbers in a config that say how many modules are built."""


def _refuse_boundless(config: PretrainedConfig) -> None:
    """Refuse an architecture that would fill the memory before one weight is looked for.

    Raises:
        InputError: it has more layers or experts than any model.
    """
    for key, most in _LIMITED.items():
        number = getattr(config, key, 0)
        if isinstance(number, int):
            require_size(f"config.json: {key}", number, most, "correct it")


def _no_model(config: PretrainedConfig, error: Exception) -> str:
    pad, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    cause = f"{type(error).__name__}: {_one_line(error)}".removesuffix(": ")
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        cause += f"; pad_token_id = {pad} is outside the vocabulary of {size}, so set it to null"
    return f"the {config.model_type} architecture does not define a model: {cause}; correct config.json"


_OURS = (FAMILY, SMOOTHING, QUANTIZATION, RECORDS)
"""Keys of an architecture that change a plain model; they are handled here, not by transformers' config."""


_OUTPUTS = frozenset(
    {
        "return_dict",
        "use_return_dict",
        "output_hidden_states",
        "output_attentions",
        "output_router_logits",
        "torchscript",
    }
)
"""Keys of a config that choose what a forward pass returns beside the logits, and how. They define no model, and what
is scored here is the logits."""


_CHANGED = {"pruned_heads": "prune the weights themselves (`model.prune_heads` and `save_pretrained`)"}
"""Keys that changed a model in some version of transformers and are ignored in others, each with the cure."""


def _without_outputs(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_outputs(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _OUTPUTS
    }


def _make_config(architecture: Mapping[str, Any]) -> PretrainedConfig:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = architecture.get("model_type")
    for key in _CHANGED.keys() & architecture.keys():
        if architecture[key]:
            raise InputError(f"config.json: {key} = {str(architecture[key])[:80]} is not supported; {_CHANGED[key]}")
    try:
        config_class = CONFIG_MAPPING[str(model_type)]
    except KeyError:
        raise InputError(
            f"model_type {model_type!r} is not known to the installed transformers; upgrade transformers, or use a "
            "model of a known type (code that comes with a checkpoint is never run)"
        ) from None
    with _quiet_transformers():
        try:
            plain = {key: value for key, value in architecture.items() if key not in _OURS}
            return config_class.from_dict(untag_floats(_without_outputs(plain)))
        except Exception as error:  # transformers validates configs with error types of its own
            raise InputError(
                f"the {model_type} config is not valid: {_one_line(error)}; correct config.json"
            ) from error


def _causal_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = config.model_type
    cure = "give a decoder-only causal language model"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{kind} is an encoder-decoder model, which scores targets given an input; {cure}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{kind} is not a causal language model; {cure}")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise InputError(f"{kind} is an encoder-only model and sees the tokens it predicts; {cure}")
    # Gemma 4 says `vision` where only the parts of an image see each other.
    if getattr(config.get_text_config(), "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise InputError(f"this {kind} attends in both directions and sees the tokens it predicts; {cure}")
    return cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def _config_for(causal_class: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """What a class is built from: of a model of text and images that is registered with its text model, that part."""
    is_part = config.sub_configs.get("text_config") is causal_class.config_class
    return config.get_text_config() if is_part else config


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Tensors that a model ties, each with the one that it is the same as."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _ignorable(model: PreTrainedModel, names: Mapping[str, Any] | set[str]) -> set[str]:
    """Names that transformers drops without a word: buffers of old checkpoints that are computed nowadays."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    own = _own_names(model)
    return {name for name in names if name not in own and any(re.search(pattern, name) for pattern in patterns)}


def _own_names(model: PreTrainedModel) -> set[str]:
    """Names of the model's weights, also without the prefix of its body, as older checkpoints have them.

    (GPT-2 on the hub says `h.0.attn.c_attn.bias`, which its pattern for derivable buffers would match.)
    """
    names = set(model.state_dict())
    return names | {name.removeprefix(f"{model.base_model_prefix}.") for name in names}


def copied_names(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """What the model computes itself and what it ties: a copy would be paid for in the code length."""
    dropped = _ignorable(model, tensors)
    for target, source in tied_names(model).items():
        if target in tensors and source in tensors and _identical(tensors, target, source):
            dropped.add(target)
    return dropped


def _identical(tensors: Mapping[str, torch.Tensor], left: str, right: str) -> bool:
    return header_of(tensors, left) == header_of(tensors, right) and torch.equal(tensors[left], tensors[right])


def refuse_uncovered(blank: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Catch what the loading report of transformers leaves out."""
    halved = {name for name in tensors if header_of(tensors, name)[0].is_complex}
    if halved:
        raise InputError(f"tensors {_some(halved)} are complex, and only their real parts would be used; remove them")
    unplaced = _ignorable(blank, tensors)
    if unplaced:
        raise InputError(f"the model computes {_some(unplaced)} itself; leave them out of the tensors")
    optional = blank._keys_to_ignore_on_load_missing or ()
    given = {name.removeprefix(f"{blank.base_model_prefix}.") for name in tensors}
    absent = {
        name
        for name in blank.state_dict().keys() - tied_names(blank).keys()
        if name.removeprefix(f"{blank.base_model_prefix}.") not in given
        and any(re.search(pattern, name) for pattern in optional)
    }
    if absent:
        raise InputError(f"no tensor for {_some(absent)}, which transformers would fill by itself; add them")


def _refuse_incomplete(report: Mapping[str, Any]) -> None:
    missing, unknown = set(report["missing_keys"]), set(report["unexpected_keys"])
    misshapen = {item[0] if isinstance(item, tuple) else item for item in report["mismatched_keys"]}
    if misshapen:
        raise InputError(f"tensors of another shape than the architecture asks for: {_some(misshapen)}")
    if missing:
        raise InputError(f"no tensor for {_some(missing)}; they would be random. Give a complete checkpoint")
    if unknown:
        raise InputError(f"the model has no place for the tensors {_some(unknown)}; remove them or fix the config")
    if report["error_msgs"]:
        raise InputError(f"the tensors do not fit the architecture: {' '.join(map(str, report['error_msgs']))[:300]}")


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
