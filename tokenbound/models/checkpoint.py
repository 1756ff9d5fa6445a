"""Hugging Face checkpoints: from safetensors files to exact tensors, and from tensors to a causal language model.

Nothing here runs code that came with a checkpoint: weights are read as safetensors only, and the architecture must
be one that the installed transformers knows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenbound.compression.tensor_map import Header, TensorMap
from tokenbound.errors import InputError
from tokenbound.gguf_file import ENDING, locate_gguf, parts_of
from tokenbound.limits import MAX_HEADER_BYTES, require_content, require_regular, require_size
from tokenbound.models.gguf.checkpoint import read_gguf_architecture
from tokenbound.models.gguf.tensors import GgufTensors
from tokenbound.models.hf_model import blank_model, copied_names
from tokenbound.models.quantized.deployed import read_records
from tokenbound.models.quantized.schemes import (
    QUANTIZATION,
    RECORDS,
    implied_settings,
    scheme_of,
)
from tokenbound.models.safetensors_file import DTYPES
from tokenbound.models.special_floats import tag_floats
from tokenbound.store.copies import local_copy

logger = logging.getLogger(__name__)

_PICKLE_PATTERNS = ("pytorch_model*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.bin")
_NOT_ARCHITECTURE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "distributed_config",
        "dtype",
        "fusion_config",
        "torch_dtype",
        "transformers_version",
        "transformers_weights",
        "use_cache",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "attn_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "experts_implementation",
    }
)
"""Config keys that say where a model came from or how to run it. They are neither paid for nor obeyed: some of them
(`auto_map`, an attention implementation on the hub) name code to download."""
_KEPT = (QUANTIZATION, RECORDS)


@dataclass(frozen=True)
class Checkpoint:
    """A causal language model as it lies on disk."""

    architecture: dict[str, Any]
    """The Hugging Face config, `model_type` included, without what does not define the model."""
    tensors: TensorMap
    """Everything stored, once, in the dtype of the file; a tied copy and a derivable buffer are left out. A tensor is
    read when it is asked for."""
    directory: Path
    """Where the files lie; for a hub id, the snapshot in the hub's cache."""
    tokenizer_dir: Path | None
    """The directory again if a tokenizer lies beside the weights, else None."""


def read_checkpoint(path_or_id: str | Path, *, dense: bool = False) -> Checkpoint:
    """Read the config of a causal LM checkpoint in a directory or on the Hugging Face hub, and find its tensors.

    Args:
        path_or_id: a directory or URI with `config.json` and safetensors weights (one file, or shards with their
            index), or a hub id such as `openai-community/gpt2`, with `@revision` behind it to pin one; or a GGUF file.
        dense: of a GGUF file, the weights that its blocks stand for, in float32, in place of the blocks.

    Returns:
        The checkpoint, its tensors exact.

    Raises:
        InputError: nothing there; only pickle weights; an adapter without its base; a non-causal model, or one
            quantized in an unknown way; a shard missing or damaged. The message names the cure.
    """
    gguf = _find_gguf(path_or_id)
    if gguf is not None:
        return _of_gguf(gguf, path_or_id, dense)
    directory = locate(path_or_id)
    architecture = _read_architecture(directory)
    tensors = _find_tensors(directory, path_or_id)
    if unread := other_weights(directory):
        logger.warning("checkpoint %s also holds %s, which are not read", directory, ", ".join(unread))
    architecture = {**implied_settings(tensors), **architecture, **_records(architecture, directory)}
    blank = blank_model(architecture, len(tensors))
    tokenizer = any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    kept = tensors.only(set(tensors) - copied_names(blank, tensors))
    return Checkpoint(architecture, kept, directory, directory if tokenizer else None)


def _find_gguf(path_or_id: str | Path) -> Path | None:
    """The GGUF file that a checkpoint is, on this machine; None if it is another kind."""
    return locate_gguf(local_copy(str(path_or_id)))


def _of_gguf(path: Path, origin: str | Path, dense: bool) -> Checkpoint:
    architecture = read_gguf_architecture(path)
    tensors = GgufTensors.of(path, str(origin), dense=dense)
    if dense:
        architecture.pop(QUANTIZATION, None)
    blank = blank_model(architecture, len(tensors))
    kept = tensors.only(set(tensors) - copied_names(blank, tensors))
    return Checkpoint(architecture, kept, path.parent, None)


def check_checkpoint(path_or_id: str | Path) -> dict[str, Any]:
    """The architecture of a checkpoint whose files are there and sound as far as their headers say; reads no tensor.

    Of a hub id only `config.json` is fetched.

    Raises:
        InputError: as for `read_checkpoint`, but for what only the tensors show.
    """
    gguf = _find_gguf(path_or_id)
    if gguf is not None:
        architecture = read_gguf_architecture(gguf)
        blank_model(architecture)
        return architecture
    directory = locate(path_or_id, _ARCHITECTURE_FILES)
    architecture = _read_architecture(directory)
    if Path(path_or_id).expanduser().is_dir():
        for path in _weight_files(directory):
            _read_headers(path)
    blank_model(architecture)
    return architecture


def read_architecture(path_or_id: str | Path) -> dict[str, Any]:
    """The architecture of a checkpoint, whose weights need not be there; of a hub id only `config.json` is fetched.

    Raises:
        InputError: no such checkpoint, or no config of a causal language model that can be read.
    """
    gguf = _find_gguf(path_or_id)
    if gguf is not None:
        return read_gguf_architecture(gguf)
    return _read_architecture(locate(path_or_id, _ARCHITECTURE_FILES))


def stored_bytes(path: str | Path) -> int:
    """Bytes of the weight files of a checkpoint here, GGUF or safetensors; 0 where there are none."""
    place = Path(path).expanduser()
    files = parts_of(place) if place.suffix == ENDING else place.glob("*.safetensors")
    return sum(file.stat().st_size for file in files if file.is_file())


def sample_weights(
    directory: str | Path, *, tensors: int, weights: int, dense: bool = False
) -> dict[str, torch.Tensor]:
    """Leading rows of some tensors of a checkpoint directory, in an order that only their names decide.

    Args:
        directory: with safetensors weights, in one file or in shards; or a GGUF file.
        tensors: how many to read at most.
        weights: of each tensor, about so many at most.
        dense: as in `read_checkpoint`.

    Returns:
        By name; nothing else of the files is read. Empty where there are no safetensors files.
    """
    from safetensors import safe_open

    gguf = _find_gguf(directory)
    if gguf is not None:
        stored = GgufTensors.of(gguf, str(directory), dense=dense)
        return {name: _leading_rows(stored[name], weights) for name in _chosen(stored, tensors)}
    files: list[Any] = [safe_open(path, "pt") for path in sorted(Path(directory).glob("*.safetensors"))]
    places = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    return {name: _leading_rows(places[name].get_slice(name), weights) for name in _chosen(places, tensors)}


def _chosen(names: Iterable[str], count: int) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count]


def _leading_rows(view: Any, weights: int) -> torch.Tensor:
    shape = list(view.shape) if isinstance(view, torch.Tensor) else view.get_shape()
    if not shape:
        tensor: torch.Tensor = view[:]
        return tensor
    rows: torch.Tensor = view[: max(1, weights // max(1, math.prod(shape[1:])))]
    return rows


# --- Files --------------------------------------------------------------------------------------------------------


_WHOLE_CHECKPOINT = ("*.safetensors", "*.json")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The two forms in which transformers saves a model."""
_ADAPTER = "adapter_config.json"
_ARCHITECTURE_FILES = ("config.json", _ADAPTER)


def is_hub_id(text: str) -> bool:
    """Whether a text could be the id of a model on the hub, with or without `@revision`.

    >>> is_hub_id("org/name@v1"), is_hub_id("./name"), is_hub_id("a/b/c")
    (True, False, False)
    """
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", text) is not None and not text.startswith(".")


def locate_config(path_or_id: str | Path) -> Path:
    """The directory with the configs of a checkpoint or adapter; of a hub id, only they are fetched.

    Raises:
        InputError: there is no such directory, and the hub has none of this name.
    """
    return locate(path_or_id, _ARCHITECTURE_FILES)


def locate(path_or_id: str | Path, patterns: Sequence[str] = _WHOLE_CHECKPOINT) -> Path:
    """The directory of a checkpoint or adapter; files of a hub id that match the patterns are fetched.

    Raises:
        InputError: there is no such directory, and the hub has none of this name.
    """
    path = Path(local_copy(str(path_or_id))).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"checkpoint {path} is a file; give the directory that holds config.json and the weights")
    text = str(path_or_id)
    if not is_hub_id(text):
        raise InputError(f"checkpoint {text} does not exist; give a directory or a hub id such as org/name")
    return _download(text, patterns)


def _download(hub_id: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = hub_id.partition("@")
    try:
        # The patterns are matched against whole paths: sub-directories (onnx/, original/) stay behind.
        folder = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"checkpoint {hub_id} is no local directory and could not be fetched from the hub ({reason}); "
            "check the name, the network and, for a gated model, `hf auth login`"
        ) from None
    return Path(folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        InputError: the file is missing, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a checkpoint is a directory with config.json and weights") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); fetch the checkpoint again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object; fetch the checkpoint again")
    return value


def _read_architecture(directory: Path) -> dict[str, Any]:
    _refuse_adapter(directory)
    raw = read_json(directory / "config.json")
    if other := raw.get("transformers_weights"):
        raise InputError(
            f"{directory}/config.json: transformers_weights names the weights {str(other)[:80]!r}, which are not read; "
            "save the model again with `model.save_pretrained`"
        )
    scheme_of(raw, str(directory))
    return clean_architecture(raw)


def _refuse_adapter(directory: Path) -> None:
    """A model is one set of weights: transformers would put an adapter beside full weights onto them."""
    if not (directory / _ADAPTER).exists():
        nested = sorted(path.parent.name for path in directory.glob(f"*/{_ADAPTER}"))
        if nested and not (directory / "config.json").exists():
            raise InputError(
                f"checkpoint {directory} has no config.json, but adapters in {', '.join(nested[:5])}; give the folder "
                "of one adapter, with its base in `base`"
            )
        return
    weights = next((name for name in (SINGLE, INDEX) if (directory / name).exists()), None)
    if weights is not None:
        raise InputError(
            f"checkpoint {directory} holds both full weights ({weights}) and an adapter ({_ADAPTER}), which "
            "transformers would apply to them; merge the adapter (peft: "
            f"`model.merge_and_unload().save_pretrained(OUT)`), or move {_ADAPTER} out of the folder"
        )
    raise InputError(
        f"checkpoint {directory} is an adapter without its base model; name the base (`base:` in a "
        "config, --base for `compress`), or merge it (peft: `model.merge_and_unload().save_pretrained(OUT)`)"
    )


def clean_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a Hugging Face config that defines the model, nested configs included; a quantization stays whole.

    The result is strict JSON data: infinities and NaN are tagged.

    Example:
        >>> clean_architecture({"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}, "torch_dtype": "float16"})
        {'model_type': 'llama'}
    """
    return {
        key: clean_architecture(value) if isinstance(value, Mapping) and key not in _KEPT else tag_floats(value)
        for key, value in config.items()
        if key not in _NOT_ARCHITECTURE
    }


def _records(architecture: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """What the files' headers say of quantized weights, as a key of the architecture; empty for most methods."""
    method = scheme_of(architecture)
    if method is None or method.name != "torchao":
        return {}
    found = {name: record for path in _weight_files(directory) for name, record in read_records(path).items()}
    return {RECORDS: found}


def _weight_files(directory: Path) -> list[Path]:
    """One file, or the shards that the index names.

    Raises:
        InputError: there are no safetensors files, the folder holds two models, or the index is damaged or stale.
    """
    index, single = directory / INDEX, directory / SINGLE
    if index.exists():
        shards = sorted(set(_places(index).values()))
        _refuse_two_sets(directory, shards)
        return [directory / name for name in shards]
    shards = _shards(directory)
    if single.exists():
        if shards:
            raise InputError(_two_sets(directory, SINGLE, shards[0]))
        return [single]
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        raise InputError(
            f"checkpoint {directory} has {others[0]} but neither model.safetensors nor model.safetensors.index.json; "
            "save it again with `model.save_pretrained`"
        )
    pickles = sorted({path.name for pattern in _PICKLE_PATTERNS for path in directory.glob(pattern)})
    if pickles:
        raise InputError(
            f"checkpoint {directory} has pickle weights only ({pickles[0]}), and loading a pickle can run any code; "
            "where you trust it, convert it once: `AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)`"
        )
    raise InputError(f"checkpoint {directory} has no model.safetensors; give a directory with safetensors weights")


_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def _shards(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("model-*.safetensors") if _SHARD.fullmatch(path.name))


def _two_sets(directory: Path, first: str, second: str) -> str:
    return (
        f"checkpoint {directory} holds two sets of weights, {first} and {second}; remove the one that you do not mean, "
        "or save the model again with `model.save_pretrained` into an empty folder"
    )


def _refuse_two_sets(directory: Path, shards: Sequence[str]) -> None:
    """Of a folder with an index: transformers would load `model.safetensors` and never look at the index."""
    index = directory / INDEX
    if (directory / SINGLE).exists() and set(shards) != {SINGLE}:
        raise InputError(_two_sets(directory, SINGLE, INDEX))
    for name in shards:
        if not (directory / name).exists():
            raise InputError(
                f"the index {index} is stale: it names {name}, which is missing; fetch the checkpoint again"
            )
    strangers = sorted(set(_shards(directory)) - set(shards))
    if strangers:
        raise InputError(
            f"the index {index} is stale, or the folder holds two sets of weights: {strangers[0]} is not in the index; "
            f"remove the file, or save the model again with `model.save_pretrained` into an empty folder"
        )


_LOADED = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_OTHER_WEIGHTS = (*_PICKLE_PATTERNS, "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.npz")
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "optimizer.bin"})
"""What a training run leaves beside its weights; `rng_state*.pth` belongs to it too."""


def other_weights(path_or_id: str | Path) -> list[str]:
    """Weight files of a checkpoint that are not scored: variants, consolidated copies, other formats.

    transformers does not load them either, so long as nobody asks for them. They may hold another model, so the
    certificate names them. Of a hub id, those that are fetched are seen: safetensors at the top of the repository.
    """
    if _find_gguf(path_or_id) is not None:
        return []
    directory = locate(path_or_id)
    variants = {path.name for path in directory.glob("*.safetensors") if not _LOADED.fullmatch(path.name)}
    if (directory / _ADAPTER).exists():
        variants.discard("adapter_model.safetensors")  # then it is what was read
    copies = {path.name for pattern in _OTHER_WEIGHTS for path in directory.glob(pattern)}
    return sorted(variants | {name for name in copies - _NO_WEIGHTS if not name.startswith("rng_state")})


def _places(index: Path) -> dict[str, str]:
    """The file of every tensor, as an index says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index} has no `weight_map` of tensor names to files; fetch the checkpoint again")
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise InputError(f"{index} names {name!r}, which is not a file beside it; fetch the checkpoint again")
    return places


class CheckpointTensors(TensorMap):
    """The tensors of safetensors files, each read from its file when it is asked for.

    Example:
        >>> tensors = read_checkpoint("models/x").tensors  # doctest: +SKIP
        >>> tensors["model.norm.weight"]  # doctest: +SKIP
    """

    def __init__(
        self, directory: Path, places: Mapping[str, str], headers: Mapping[str, Header], origin: str | Path
    ) -> None:
        """Read nothing yet.

        Args:
            directory: Where the files are on this machine.
            places: The file of each tensor.
            headers: Dtype and shape of each tensor.
            origin: What the checkpoint was named by: a machine without this directory finds the files by it.
        """
        self.directory, self.origin = directory, origin
        self.names = self.places = dict(places)
        self.headers = dict(headers)

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor; the file is mapped as long as it is in use.

        Raises:
            InputError: the file is missing or damaged by now.
        """
        from safetensors import safe_open

        if not self.directory.is_dir():
            self.directory = locate(self.origin)
        path = self.directory / self.places[name]
        with _sound(path), safe_open(path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def header(self, name: str) -> Header:
        """Dtype and shape of a tensor, as the file's header says them."""
        return self.headers[name]

    def only(self, names: Collection[str]) -> CheckpointTensors:
        """Those of these names."""
        places = {name: place for name, place in self.places.items() if name in names}
        return CheckpointTensors(self.directory, places, {name: self.headers[name] for name in places}, self.origin)


def _find_tensors(directory: Path, origin: str | Path) -> CheckpointTensors:
    places: dict[str, str] = {}
    headers: dict[str, Header] = {}
    for path in _weight_files(directory):
        found = _read_headers(path)
        doubled = places.keys() & found.keys()
        if doubled:
            raise InputError(f"{path} repeats tensor {min(doubled)!r} of another shard; fetch it again")
        places |= dict.fromkeys(found, path.name)
        headers |= found
    index = directory / INDEX
    difference = _places(index).keys() ^ places.keys() if index.exists() else None
    if difference:
        raise InputError(
            f"the index {index} is stale: it and its shards disagree about tensor {min(difference)!r}; fetch the "
            "checkpoint again"
        )
    return CheckpointTensors(directory, places, headers, origin)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one small file, all of them.

    Raises:
        InputError: the file is missing or damaged.
    """
    from safetensors.torch import load_file

    with _sound(path):
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors


def _read_headers(path: Path) -> dict[str, Header]:
    """Dtype and shape of every tensor of a file.

    Raises:
        InputError: the file is missing or damaged.
    """
    from safetensors import safe_open

    with _sound(path), safe_open(path, "pt") as file:
        return {name: _header(file, name) for name in file.keys()}  # noqa: SIM118


def _header(file: Any, name: str) -> Header:
    view = file.get_slice(name)
    dtype = DTYPES.get(view.get_dtype()) or file.get_tensor(name).dtype  # newer versions of the format know more
    return dtype, tuple(view.get_shape())


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    if not path.exists():
        raise InputError(f"{path} is missing; fetch the checkpoint again")
    require_regular(path)
    require_content(path)
    with path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if header <= path.stat().st_size:  # else the reader names the damage
        require_size(f"{path}: bytes of its header", header, MAX_HEADER_BYTES, "split the file into shards")
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a sound safetensors file ({error}); fetch the checkpoint again") from None


# --- Models -------------------------------------------------------------------------------------------------------


# --- Coverage -----------------------------------------------------------------------------------------------------
