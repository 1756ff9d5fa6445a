"""The `adapter_config.json` of a peft LoRA adapter: every key is understood, known to change nothing, or refused.

An adapter is data that another program interprets. A key that this package skipped could change the base weights or
the forward pass, and the losses would belong to another model than the one that was named. So a key that is set and
stands on neither list below stops the run. Light: this does not pull in torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenbound.errors import InputError
from tokenbound.models.quantized.regexes import require_quick_patterns

MERGE = (
    "merge it with peft (`model.merge_and_unload().save_pretrained(OUT)`) and give OUT as the checkpoint beside the "
    "same `base`"
)
"""The cure for an adapter that only peft can interpret."""

UNDERSTOOD = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "trainable_token_indices",
        "bias",
        "lora_bias",
        "use_dora",
        "init_lora_weights",
        "ensure_weight_tying",
    }
)
"""Keys whose value decides what is read or how it is applied."""

HARMLESS = frozenset(
    {
        "auto_mapping",  # the Python class that peft wraps; the base's own config decides the class here
        "peft_version",  # of the writer
        "inference_mode",  # whether gradients are on
        "lora_dropout",  # training only
        "fan_in_fan_out",  # peft corrects it by the layer's class, which is what is used here
        "megatron_core",  # name of a package, used only with `megatron_config`
        "qalora_group_size",  # used only with `use_qalora`
        "runtime_config",  # where peft keeps its buffers; it does not save it
        # Settings of initializations. What an initialization does to the base is judged by `init_lora_weights`.
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    }
)
"""Keys that change no weight of a saved adapter."""

_KEEPS_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Initializations that fill only the factors, which the saved ones replace. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA
also change the base weights; peft's own conversion to plain LoRA writes `true`."""

_UNCHANGED = (
    "save it as plain LoRA with peft (`model.save_pretrained(OUT, path_initial_model_for_weight_conversion=...)`), or "
    f"{MERGE}"
)
_CURES = {
    "alora_invocation_tokens": (
        "an activated LoRA works only behind its invocation tokens and cannot be merged; give a plain LoRA adapter"
    )
}
"""For keys that merging does not help."""
_TASKS = (None, "", "CAUSAL_LM")
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class AdapterConfig:
    """What a LoRA adapter's config says of its tensors."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    trainable_tokens: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    use_dora: bool
    ensure_weight_tying: bool
    named_base: str | None
    """The base that the adapter says it was trained on, with `@revision` where one is given."""

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by the first pattern that matches its name."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, layer), self.rank)

    def scaling_of(self, layer: str) -> float:
        """What a layer's product of factors is multiplied with."""
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, layer), self.alpha)
        return _scaling(alpha, self.rank_of(layer), self.use_rslora)

    @property
    def scaling(self) -> float:
        """The scaling of layers that no pattern names."""
        return _scaling(self.alpha, self.rank, self.use_rslora)

    def saves(self, module: str) -> bool:
        """Whether a module is one of `modules_to_save`; peft compares endings."""
        return any(module.endswith(name) for name in self.modules_to_save)

    def targets(self, module: str) -> bool:
        """Whether the config puts LoRA factors on a module, by peft's rules."""
        if _is_named(self.exclude_modules, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return False
        if self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        if not _is_named(self.target_modules, module):
            return False
        # A module that is named in full is a target whatever its layer.
        return module in self.target_modules or not self.layers_to_transform or self._is_transformed(module)

    def _is_transformed(self, module: str) -> bool:
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return found is not None and int(found[1]) in self.layers_to_transform


def _scaling(alpha: float, rank: int, stabilized: bool) -> float:
    return alpha / (math.sqrt(rank) if stabilized else rank)


def _pattern_key(patterns: Iterable[str], layer: str) -> str:
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), layer)


def _is_named(names: str | Sequence[str], module: str) -> bool:
    """A regular expression must match the whole name; of a list, one entry must be the name or its ending."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def parse_adapter_config(config: Mapping[str, Any]) -> AdapterConfig:
    """Read an adapter's config.

    Args:
        config: `adapter_config.json`, or `LoraConfig.to_dict()`.

    Raises:
        InputError: a key that is set and neither understood nor harmless, or a value that is not; by name.

    >>> parse_adapter_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}).scaling
    2.0
    >>> parse_adapter_config({"peft_type": "LORA", "r": 4, "use_qalora": True})
    Traceback (most recent call last):
    tokenbound.errors.InputError: adapter_config.json: use_qalora = True is not supported; merge it with peft ...
    """
    given = {key: getattr(value, "value", value) for key, value in config.items() if not _is_empty(value)}
    kind = given.get("peft_type")
    if str(kind).upper() != "LORA":
        raise _refusal("peft_type", kind, MERGE)
    for key in sorted(given):
        if key not in UNDERSTOOD and key not in HARMLESS:
            raise _refusal(key, given[key], _CURES.get(key, MERGE))
    if given.get("task_type") not in _TASKS:
        raise _refusal("task_type", given["task_type"], "give an adapter of a causal language model (CAUSAL_LM)")
    _require_plain_init(given.get("init_lora_weights"))
    if given.get("bias", "none") not in _BIASES:
        raise _refusal("bias", given["bias"], MERGE)
    try:
        found = _typed(given)
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError) as error:
        raise InputError(
            f"adapter_config.json is not a valid LoRA config ({error!r}); save it again with peft"
        ) from None
    _require_patterns(found)
    return found


def _is_empty(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | Mapping | Sequence | set) and not value)


def _refusal(key: str, value: object, cure: str) -> InputError:
    text = " ".join(repr(value).split())
    return InputError(f"adapter_config.json: {key} = {text[:120]} is not supported; {cure}")


def _require_plain_init(value: object) -> None:
    if value is None or value is True or (isinstance(value, str) and value.lower() in _KEEPS_BASE):
        return
    raise InputError(
        f"adapter_config.json: init_lora_weights = {str(value)[:60]!r} also changes the base weights, so the factors "
        f"alone do not define the model; {_UNCHANGED}"
    )


def _typed(given: Mapping[str, Any]) -> AdapterConfig:
    revision = given.get("revision")
    named = given.get("base_model_name_or_path")
    return AdapterConfig(
        rank=_rank(given["r"]),
        alpha=_alpha(given["lora_alpha"]),
        use_rslora=_flag(given, "use_rslora"),
        rank_pattern={str(key): _rank(value) for key, value in dict(given.get("rank_pattern", {})).items()},
        alpha_pattern={str(key): _alpha(value) for key, value in dict(given.get("alpha_pattern", {})).items()},
        target_modules=_names(given["target_modules"]) if "target_modules" in given else None,
        exclude_modules=_names(given.get("exclude_modules", ())),
        layers_to_transform=_indices(given.get("layers_to_transform", ())),
        layers_pattern=_list(given.get("layers_pattern", ())),
        modules_to_save=_list(given.get("modules_to_save", ())),
        trainable_tokens=_tokens(given.get("trainable_token_indices", ())),
        use_dora=_flag(given, "use_dora"),
        ensure_weight_tying=_flag(given, "ensure_weight_tying"),
        named_base=None if named is None else f"{named}@{revision}" if revision not in (None, "main") else str(named),
    )


def _flag(given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key} = {value!r}")
    return value


def _rank(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"rank {value!r}")
    return value


def _alpha(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"lora_alpha {value!r}")
    return float(value)


def _names(value: object) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _list(value)


def _elements(value: object) -> tuple[object, ...]:
    if not isinstance(value, Iterable):
        raise TypeError(f"{value!r} is not a list")
    return tuple(sorted(value)) if isinstance(value, set) else tuple(value)


def _list(value: object) -> tuple[str, ...]:
    every = (value,) if isinstance(value, str) else _elements(value)
    found = tuple(name for name in every if isinstance(name, str))
    if len(found) < len(every):
        raise ValueError(f"names {value!r}")
    return found


def _indices(value: object) -> tuple[int, ...]:
    every = (value,) if isinstance(value, int) else _elements(value)
    found = tuple(index for index in every if isinstance(index, int) and index >= 0)
    if len(found) < len(every):
        raise ValueError(f"indices {value!r}")
    return found


def _tokens(value: object) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    if isinstance(value, Mapping):
        return {str(key): _indices(indices) for key, indices in value.items()}
    return _indices(value)


def _require_patterns(config: AdapterConfig) -> None:
    """Names in these places are regular expressions to peft: they must compile and cannot be allowed to hang."""
    lists = (config.target_modules, config.exclude_modules)
    patterns = [text for text in lists if isinstance(text, str)]
    patterns += [*config.rank_pattern, *config.alpha_pattern, *config.layers_pattern, *config.modules_to_save]
    require_quick_patterns([f"re:{text}" for text in patterns], place="adapter_config.json")
