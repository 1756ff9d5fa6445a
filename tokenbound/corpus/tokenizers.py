"""Text to token ids: raw bytes, or any Hugging Face fast tokenizer.

Only the tokenizer's text pipeline runs here: no truncation, no padding, no BOS/EOS template, no merge dropout.
Text that looks like a special token is plain text: ``<s>`` in a document is three characters, never id 1, unless the
config says `special_tokens: parse`.
Putting BOS and EOS around documents is the corpus config's business (`tokenbound.corpus.prepare`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from tokenbound.corpus.gguf_tokenizer import read_gguf_tokenizer
from tokenbound.errors import InputError
from tokenbound.gguf_file import locate_gguf
from tokenbound.limits import require_content
from tokenbound.store.copies import local_copy

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Pipeline

Ids = npt.NDArray[np.unsignedinteger[Any]]

BYTES_END_ID = 256
"""The one id of the `bytes` tokenizer that is no byte: the end of a document, used before one as BOS too."""

PIECE_CHARACTERS = 1 << 18
"""A longer document is encoded in pieces of about so many characters where that gives the same ids: an encoding holds
140 bytes for each, which of a line of 20 MB is 2.9 GB."""

HEAD_CHARACTERS = 64
"""Of a document, what is tokenised again to see where its first token ends."""

GENERIC_CLASSES = (None, "TokenizersBackend", "PreTrainedTokenizerFast")
"""Values of ``tokenizer_class`` that bring no BOS or EOS of their own."""


class Tokenizer(Protocol):
    """What the corpus and the certificate need to know of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """V_tok: how many ids there are; log2 of it is random guessing."""

    @property
    def max_id(self) -> int:
        """Largest id; a model needs more logits than this."""

    @property
    def bos_id(self) -> int | None:
        """Beginning-of-sequence id, if the tokenizer has one."""

    @property
    def eos_id(self) -> int | None:
        """End-of-sequence id, if the tokenizer has one."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of `files`."""

    @property
    def special_texts(self) -> tuple[str, ...]:
        """How the special tokens are spelled."""

    def encode_batch(self, documents: Sequence[str | bytes], *, parse_special: bool = False) -> list[Ids]:
        """Ids of each document, without BOS or EOS; one array per document.

        Args:
            documents: texts.
            parse_special: whether text that spells a special token becomes its id.
        """

    def first_token_bytes(self, document: str | bytes, ids: Ids, *, parse_special: bool = False) -> int:
        """At least how many UTF-8 bytes of a document its first token spells; 0 where it has no token."""

    def token_spans(self, documents: Sequence[str], *, parse_special: bool = False) -> list[npt.NDArray[np.int64]]:
        """For each document int64 [T, 2]: first character and end of what each token of `encode_batch` spells."""

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Text of ids, special ones left out."""

    def files(self) -> bytes:
        """Canonical serialisation; `tokenizer_from_bytes` restores the tokenizer from it."""


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer named by a config: ``bytes``, a directory, a ``tokenizer.json``, a GGUF file, or a hub id.

    A ``tokenizer.json`` is taken as it is, so the ids do not depend on the version of transformers; a tokenizer
    without one is converted by transformers, and refused if it has no fast form. Loading is cached per process.

    Raises:
        InputError: nothing is there, it cannot be read, or it is a slow (Python) tokenizer.
    """
    return BytesTokenizer() if spec == "bytes" else _load_fast(spec)


def tokenizer_from_bytes(data: bytes) -> Tokenizer:
    """Inverse of `Tokenizer.files`.

    >>> tokenizer_from_bytes(BytesTokenizer().files()).vocab_size
    257

    Raises:
        InputError: the bytes are no tokenizer.
    """
    try:
        tree = json.loads(data)
        if tree == {"tokenizer": "bytes"}:
            return BytesTokenizer()
        return FastTokenizer(tree["tokenizer"], bos_id=tree["bos_id"], eos_id=tree["eos_id"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"these bytes hold no tokenizer: {_one_line(error)}") from None


class BytesTokenizer:
    """Each byte is its own id; id 256 ends a document.

    >>> BytesTokenizer().encode_batch(["hé"])[0].tolist()
    [104, 195, 169]
    """

    vocab_size = 257
    max_id = BYTES_END_ID
    bos_id: int | None = BYTES_END_ID
    eos_id: int | None = BYTES_END_ID

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of `files`."""
        return hashlib.sha256(self.files()).hexdigest()

    special_texts: tuple[str, ...] = ()

    def encode_batch(self, documents: Sequence[str | bytes], *, parse_special: bool = False) -> list[Ids]:
        """Byte values; text is encoded as UTF-8 first."""
        stored = (text.encode() if isinstance(text, str) else text for text in documents)
        return [np.frombuffer(data, dtype=np.uint8).astype(np.uint16) for data in stored]

    def first_token_bytes(self, document: str | bytes, ids: Ids, *, parse_special: bool = False) -> int:
        """One byte."""
        return min(1, len(ids))

    def token_spans(self, documents: Sequence[str], *, parse_special: bool = False) -> list[npt.NDArray[np.int64]]:
        """Each byte lies in one character.

        >>> BytesTokenizer().token_spans(["hé"])[0].tolist()
        [[0, 1], [1, 2], [1, 2]]
        """
        sizes = ([len(character.encode()) for character in document] for document in documents)
        places = [np.repeat(np.arange(len(each), dtype=np.int64), each) for each in sizes]
        return [np.stack([place, place + 1], axis=1) for place in places]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Text of the byte ids; broken UTF-8 becomes U+FFFD."""
        return bytes(int(token) for token in ids if token < BYTES_END_ID).decode(errors="replace")

    def files(self) -> bytes:
        """Canonical serialisation."""
        return _canonical({"tokenizer": "bytes"})


class FastTokenizer:
    """A Hugging Face ``tokenizer.json`` pipeline with its BOS and EOS ids."""

    def __init__(self, definition: dict[str, Any], *, bos_id: int | None, eos_id: int | None) -> None:
        """Build the pipeline.

        Args:
            definition: the parsed ``tokenizer.json``.
            bos_id: beginning-of-sequence id, if there is one.
            eos_id: end-of-sequence id, if there is one.

        Raises:
            InputError: the pipeline cannot be built, or plain text could still become a special token.
        """
        self._definition = _text_pipeline(definition)
        self._files = _canonical({"tokenizer": self._definition, "bos_id": bos_id, "eos_id": eos_id})
        self._decoder = _build(self._definition)
        self._encoder = _plain_text_encoder(self._definition)
        self._has_cuts = _has_cuts(self._definition)
        added = self._definition.get("added_tokens") or ()
        self.special_texts: tuple[str, ...] = tuple(token["content"] for token in added if token["special"])
        ids = self._decoder.get_vocab(with_added_tokens=True).values()
        self.vocab_size = len(set(ids))
        self.max_id = max(ids, default=-1)
        self._dtype = np.uint16 if self.max_id <= np.iinfo(np.uint16).max else np.uint32
        self.bos_id = bos_id
        self.eos_id = eos_id

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of `files`."""
        return hashlib.sha256(self._files).hexdigest()

    def encode_batch(self, documents: Sequence[str | bytes], *, parse_special: bool = False) -> list[Ids]:
        """Ids of each document; bytes are decoded as UTF-8, undecodable ones becoming U+FFFD."""
        texts, pipeline = _as_texts(documents), self._pipeline(parse_special)
        with _panics_named():
            if self._has_cuts and any(len(text) > PIECE_CHARACTERS for text in texts):
                found = ([self._ids(pipeline, [piece])[0] for piece in self._pieces(text)] for text in texts)
                return [np.concatenate(own) for own in found]
            return self._ids(pipeline, texts)

    def _ids(self, pipeline: Pipeline, texts: Sequence[str]) -> list[Ids]:
        encodings = pipeline.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self._dtype) for encoding in encodings]

    def first_token_bytes(self, document: str | bytes, ids: Ids, *, parse_special: bool = False) -> int:
        """At least how many UTF-8 bytes of a document its first token spells: all up to where that token ends.

        Only the beginning is tokenised again, with the places of its tokens; all of it where its end could matter.
        """
        if not len(ids):
            return 0
        [text], pipeline = _as_texts([document]), self._pipeline(parse_special)
        for head in dict.fromkeys((text[:HEAD_CHARACTERS], text)):
            found = pipeline.encode(head, add_special_tokens=False)
            if len(head) == len(text) or (found.ids and found.ids[0] == ids[0] and found.offsets[0][1] < len(head)):
                break
        end = found.offsets[0][1] if found.ids else len(text)
        return len(text[:end].encode())

    def token_spans(self, documents: Sequence[str], *, parse_special: bool = False) -> list[npt.NDArray[np.int64]]:
        """As the pipeline says; of long documents piece by piece, as they are encoded."""
        pipeline = self._pipeline(parse_special)
        with _panics_named():
            if any(len(self._pieces(text)) > 1 for text in documents):
                return [self._spans_of_pieces(pipeline, self._pieces(text)) for text in documents]
            encodings = pipeline.encode_batch(list(documents), add_special_tokens=False)
        return [_spans(encoding.offsets) for encoding in encodings]

    def _spans_of_pieces(self, pipeline: Pipeline, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Of the document that is made of these pieces."""
        starts = np.cumsum([0, *(len(text) for text in texts)])
        offsets = (pipeline.encode(text, add_special_tokens=False).offsets for text in texts)
        return np.concatenate([_spans(each) + start for each, start in zip(offsets, starts, strict=False)])

    def _pieces(self, text: str) -> list[str]:
        """Texts that are encoded one after the other in place of a long one."""
        return pieces(text) if self._has_cuts and len(text) > PIECE_CHARACTERS else [text]

    def _pipeline(self, parse_special: bool) -> Pipeline:
        return self._decoder if parse_special else self._encoder

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Text of ids, special ones left out."""
        return str(self._decoder.decode([int(token) for token in ids], skip_special_tokens=True))

    def files(self) -> bytes:
        """Canonical serialisation."""
        return self._files


def _spans(offsets: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    return np.array(offsets, np.int64).reshape(-1, 2)


def pieces(text: str, characters: int = PIECE_CHARACTERS) -> list[str]:
    """A text cut between a letter and a space with a letter behind it, where no token of `_has_cuts` goes on.

    Args:
        text: of one document.
        characters: of a piece, about; one goes on to the next cut. An encoding takes 140 bytes for each.

    >>> pieces("one two, three four", 3)
    ['one', ' two, three', ' four']
    """
    cuts, start = [0], characters
    while found := _CUT.search(text, max(start - 1, 0)):
        cuts.append(found.start() + 1)
        start = cuts[-1] + characters
    return [text[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


_CUT = re.compile("[a-zA-Z] (?=[a-zA-Z])")

_CONTRACTIONS, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTTABLE_PATTERNS = tuple(
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}{_REST}" for numbers in (r"\p{N}{1,3}", r"\p{N}")
)
"""Patterns of pre-tokenizers, those of Llama 3 and of Qwen 2, which begin a new piece at each space before a letter and
look at nothing in front of it; that of GPT-2 is built into `ByteLevel`."""


def _has_cuts(definition: Mapping[str, Any]) -> bool:
    """Whether the ids of a text are those of its `pieces`, one after the other."""
    before = definition.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", []) if before.get("type") == "Sequence" else [before]
    *splits, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") is not False or len(splits) > 1:
        return False
    own_pattern = last.get("use_regex", True)
    named = [
        split.get("type") == "Split"
        and split.get("pattern", {}).get("Regex") in CUTTABLE_PATTERNS
        and (split.get("behavior"), split.get("invert")) == ("Isolated", False)
        for split in splits
    ]
    added = definition.get("added_tokens") or ()
    stays_inside = all(
        token["special"] and " " not in token["content"] and not any(token.get(key) for key in _REACHING)
        for token in added
    )
    return (
        definition.get("normalizer") is None
        and definition.get("model", {}).get("type") == "BPE"
        and (named == [] if own_pattern else named == [True])
        and stays_inside
    )


_REACHING = ("lstrip", "rstrip", "single_word", "normalized")
"""Keys of an added token that make it depend on what is beside it."""


@contextmanager
def _panics_named() -> Iterator[None]:
    """Name what the native code gave up on, such as a pattern that would try for ever to match.

    Raises:
        InputError: it did; its own exception is not even an `Exception`, and would pass through every handler.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"the tokenizer gave up on a document ({_one_line(error)}); give one whose tokenizer.json has a simpler "
            "pre-tokenizer pattern, or split the document"
        ) from None


def _as_texts(documents: Sequence[str | bytes]) -> list[str]:
    return [text if isinstance(text, str) else text.decode(errors="replace") for text in documents]


# --- loading ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _load_fast(spec: str) -> FastTokenizer:
    gguf = locate_gguf(local_copy(spec))
    if gguf is not None:
        definition, bos_id, eos_id = read_gguf_tokenizer(gguf)
        return FastTokenizer(definition, bos_id=bos_id, eos_id=eos_id)
    definition_path = find_file(spec, "tokenizer.json")
    if definition_path is None:
        return _convert(spec)
    definition = read_json(definition_path)
    settings_path = find_file(spec, "tokenizer_config.json")
    if settings_path is None:
        return FastTokenizer(definition, bos_id=None, eos_id=None)
    settings = read_json(settings_path)
    if not {"bos_token", "eos_token"} <= settings.keys() and settings.get("tokenizer_class") not in GENERIC_CLASSES:
        return _with_class_defaults(spec, definition)
    return FastTokenizer(
        definition,
        bos_id=_special_id(definition, settings, "bos_token"),
        eos_id=_special_id(definition, settings, "eos_token"),
    )


def _with_class_defaults(spec: str, definition: dict[str, Any]) -> FastTokenizer:
    """Take BOS and EOS from transformers: older configs leave out what their Python class knows."""
    try:
        known = _convert(spec)
    except InputError as error:
        raise InputError(
            f"{error}; or write `bos_token` and `eos_token` (null where there is none) into its tokenizer_config.json"
        ) from None
    return FastTokenizer(definition, bos_id=known.bos_id, eos_id=known.eos_id)


def find_file(spec: str, name: str) -> Path | None:
    """A file of a local tokenizer or of one on the hub; null where the tokenizer has no such file.

    Raises:
        InputError: there is no such tokenizer.
    """
    local = Path(local_copy(spec))
    if local.is_file():
        # The file itself was named: its neighbours still say what BOS and EOS are.
        local = local.parent if name != "tokenizer.json" else local
        return local if local.is_file() else _if_file(local / name)
    if local.is_dir():
        return _if_file(local / name)
    if spec.startswith(("/", ".", "~")) or spec.partition("@")[0].count("/") > 1 or "://" in spec:
        raise InputError(f"tokenizer {spec!r} does not exist; give `bytes`, a directory or a hub id")
    return _download(spec, name)


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _download(repository: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download  # only hub ids need it
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    hub_id, _, revision = repository.partition("@")
    try:
        return Path(hf_hub_download(hub_id, name, revision=revision or None))
    except LocalEntryNotFoundError as error:
        # A subclass of EntryNotFoundError that means "offline and not in the cache", not "no such file".
        raise _unloadable(repository, error) from None
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unloadable(repository, error) from None


def _convert(spec: str) -> FastTokenizer:
    """Let transformers make a fast tokenizer out of whatever is there."""
    from transformers import AutoTokenizer  # seconds, and rarely needed

    try:
        hub_id, _, revision = (spec, "", "") if Path(spec).exists() else spec.partition("@")
        pinned = {"revision": revision} if revision else {}
        tokenizer = AutoTokenizer.from_pretrained(hub_id, use_fast=True, trust_remote_code=False, **pinned)
    except Exception as error:
        # transformers raises many kinds here; each means that this tokenizer cannot be used.
        _refuse_sentencepiece(spec)
        raise _unloadable(spec, error) from None
    if not tokenizer.is_fast:
        raise InputError(
            f"tokenizer {spec!r} is a slow (Python) tokenizer; save a fast one (tokenizer.json) and give its directory"
        )
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    return FastTokenizer(definition, bos_id=tokenizer.bos_token_id, eos_id=tokenizer.eos_token_id)


def _refuse_sentencepiece(spec: str) -> None:
    """Say what a folder holds whose only tokenizer is a sentencepiece model; transformers names another package.

    Raises:
        InputError: it does.
    """
    folder = Path(local_copy(spec)).expanduser()
    models = sorted(folder.glob("*.model")) if folder.is_dir() else [folder] if folder.suffix == ".model" else []
    if models:
        raise InputError(
            f"tokenizer {spec!r} is a sentencepiece model ({models[0].name}), and no tokenizer.json could be made of "
            "it; load it with `AutoTokenizer.from_pretrained` where `sentencepiece` is installed, call "
            "`save_pretrained`, and give that directory"
        )


def _unloadable(spec: str, error: BaseException) -> InputError:
    return InputError(
        f"tokenizer {spec!r} cannot be loaded: {_one_line(error)}; give `bytes`, a directory with a tokenizer.json, "
        "or a hub id that is reachable or in the local cache"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a tokenizer's files.

    Raises:
        InputError: the file holds none.
    """
    try:
        require_content(path)
        tree = json.loads(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer file {path} is not readable JSON: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise InputError(f"tokenizer file {path} is not a JSON object")
    return tree


def _special_id(definition: dict[str, Any], settings: dict[str, Any], key: str) -> int | None:
    """Id of the token that ``tokenizer_config.json`` names, or null when it names none.

    Raises:
        InputError: the named token has no id.
    """
    named = settings.get(key)
    content = named.get("content") if isinstance(named, dict) else named
    if content is None:
        return None
    added = {token["content"]: token["id"] for token in definition.get("added_tokens") or ()}
    declared = {token["content"]: int(key) for key, token in (settings.get("added_tokens_decoder") or {}).items()}
    vocab = definition["model"].get("vocab") or {}
    pieces = vocab if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
    for known in (added, pieces, declared):
        if content in known:
            return int(known[content])
    raise InputError(f"tokenizer: {key} {content!r} is not in its vocabulary; mend tokenizer_config.json")


# --- the pipeline ----------------------------------------------------------------------------------------------


def _text_pipeline(definition: dict[str, Any]) -> dict[str, Any]:
    """The definition without what would cut, fill, frame or randomise a document."""
    model = {key: value for key, value in definition.get("model", {}).items() if key != "dropout"}
    return definition | {"model": model, "truncation": None, "padding": None, "post_processor": None}


def _build(definition: dict[str, Any]) -> Pipeline:
    from tokenizers import Tokenizer  # keeps `import tokenbound.corpus` light

    try:
        return Tokenizer.from_str(json.dumps(definition))
    except Exception as error:
        # The Rust side raises bare Exception for every malformed definition.
        raise InputError(f"tokenizer.json cannot be used: {_one_line(error)}") from None


def _plain_text_encoder(definition: dict[str, Any]) -> Pipeline:
    """A pipeline with the same ids in which no text becomes a special token.

    ``encode_special_tokens`` stops the search for special tokens before the model runs. A Unigram or word-level
    model may still know ``</s>`` as a piece of its own; where that is so, such pieces are renamed, in the model
    and in the list of special tokens alike, to names that no text contains. Ids stay as they are.
    """
    encoder = _as_plain_text(definition)
    leaked = _leaks(encoder, definition)
    if not leaked:
        return encoder
    mark = hashlib.sha256(_canonical(definition)).hexdigest()
    encoder = _as_plain_text(_rename(definition, {content: f"\0{mark}:{content}" for content in leaked}))
    # The unknown token stays reachable by design: it is what unknown text becomes.
    if still := _leaks(encoder, definition) - {_unknown_token(definition["model"])}:
        raise InputError(f"tokenizer: the plain text {sorted(still)[0]!r} becomes a special token; use another one")
    return encoder


def _as_plain_text(definition: dict[str, Any]) -> Pipeline:
    encoder = _build(definition)
    encoder.encode_special_tokens = True
    return encoder


def _leaks(encoder: Pipeline, definition: dict[str, Any]) -> set[str]:
    """Special tokens whose own spelling, read as plain text, gives their id."""
    special = {token["content"]: token["id"] for token in definition.get("added_tokens") or () if token["special"]}
    return {
        content
        for content, index in special.items()
        if any(index in encoder.encode(text, add_special_tokens=False).ids for text in (content, f"a {content} b"))
    }


def _unknown_token(model: dict[str, Any]) -> str | None:
    """What stands for text outside the vocabulary."""
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


def _rename(definition: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The definition with some special tokens under other names and no merge that makes them."""
    model = dict(definition["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in names]
    added = [token | {"content": names.get(token["content"], token["content"])} for token in definition["added_tokens"]]
    return definition | {"model": model, "added_tokens": added}


def _merged(merge: str | list[str]) -> str:
    """What a merge rule makes; rules are pairs, or in old files one string with a space."""
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)


def _canonical(tree: object) -> bytes:
    return json.dumps(tree, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
