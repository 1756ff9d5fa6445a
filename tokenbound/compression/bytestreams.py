"""Byte strings and text as self-contained coded streams: the shortest of a few codes, tagged by one byte.

General codecs (zlib with a fixed dictionary, LZMA2, zstd) win on text and on repetition; the adaptive range
coder wins on bytes with a skewed histogram; raw wins on noise. A reader always knows beforehand how many bytes
will come out, or a limit to it, and never allocates more.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable
from math import log2
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.coder import Ints, Pass, ReadingPass, WritingPass
from tokenbound.compression.container import ArtifactError, Reader, varint

if TYPE_CHECKING:
    import pyarrow as pa

Bytes = NDArray[np.uint8]

RAW, ZSTD, XZ, RANGE, ZLIB, BARE = range(6)
"""Tags. ZSTD is a whole zstd frame, which is read only; BARE, one without the four bytes that all frames begin with."""
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

MAX_TEXT_BYTES = 1 << 28
"""Largest text section (tokenizers of large vocabularies have some 20 MB)."""
TEXT_RATIO = 1032
"""No DEFLATE stream expands further than this; a text that does would not be accepted back."""
QUICK_MARGIN = 1.6
"""How close a quick zstd must come to another code for slow codecs to be tried."""
QUICK_FLOATS = 1.05
"""The same for large tensors of floats, whose planes general codecs seldom beat and never by surprise."""
WORTH_TRYING = 0.02
"""Part by which a slow codec must shorten a large tensor's code."""
SAMPLE_RUN, SAMPLE_RUNS = 1 << 16, 4
"""Bytes in a row, and how often, that are tried before a large tensor's."""
SMALL_SAMPLE = 1 << 15
"""Bytes of which LZMA2, at ten milliseconds, is asked whether it sees what a quick zstd does not."""
_GROUP_BYTES = 32
_MIXER = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 16
MIN_WINDOW, FULL_WINDOW, MAX_WINDOW = 1 << 12, 1 << 23, 1 << 26
"""Windows of LZMA2. Up to the middle one (zstd -19 looks no further back) a window is as wide as the data."""

_DICTIONARY = (
    b'"clip_qkv":null,"embd_pdrop":0.0,"resid_pdrop":0.0,"attn_pdrop":0.0,"activation_function":"gelu_new",'
    b'"layer_norm_epsilon":1e-05,"n_ctx":1024,"n_embd":768,"n_head":12,"n_inner":null,"n_layer":12,"n_positions":1024,'
    b'"scale_attn_weights":true,"reorder_and_upcast_attn":false,"summary_type":"cls_index","summary_use_proj":true,'
    b'"partial_rotary_factor":1.0,"qk_layernorm":false,"sliding_window":null,"max_window_layers":28,'
    b'"use_sliding_window":false,"layer_types":["full_attention","sliding_attention"],"norm_eps":1e-06,'
    b'"final_logit_softcapping":null,"attn_logit_softcapping":null,"query_pre_attn_scalar":256,'
    b'"num_local_experts":8,"num_experts_per_tok":2,"output_router_logits":false,"router_aux_loss_coef":0.001,'
    b'"GPT2LMHeadModel","GPTNeoXForCausalLM","MistralForCausalLM","Qwen2ForCausalLM","Qwen3ForCausalLM",'
    b'"GemmaForCausalLM","PhiForCausalLM","OPTForCausalLM","transformer.wte.weight","transformer.wpe.weight",'
    b'"transformer.h.0.attn.c_attn.weight","c_attn.bias","c_proj.weight","c_proj.bias","ln_1.weight","ln_1.bias",'
    b'"mlp.c_fc.weight","mlp.c_fc.bias","transformer.ln_f.weight","transformer.ln_f.bias","self_attn.q_norm.weight",'
    b'"self_attn.k_norm.weight","self_attn.q_proj.bias","self_attn.k_proj.bias","self_attn.v_proj.bias",'
    b'"rope_scaling":null,"rope_theta":10000.0,"torch_dtype":"bfloat16","float16","chunk_size_feed_forward":0,'
    b'"is_encoder_decoder":false,"output_attentions":false,"output_hidden_states":false,"problem_type":null,'
    b'"return_dict":true,"id2label":{"0":"LABEL_0","1":"LABEL_1"},"label2id":{"LABEL_0":0,"LABEL_1":1},'
    b'"_name_or_path":"","architectures":["LlamaForCausalLM"],"attention_bias":false,"attention_dropout":0.0,'
    b'"bos_token_id":1,"dtype":"float32","eos_token_id":2,"head_dim":64,"hidden_act":"silu","hidden_size":128,'
    b'"initializer_range":0.02,"intermediate_size":512,"max_position_embeddings":2048,"mlp_bias":false,'
    b'"model_type":"llama","num_attention_heads":8,"num_hidden_layers":4,"num_key_value_heads":8,'
    b'"pad_token_id":null,"pretraining_tp":1,"rms_norm_eps":1e-05,"rope_parameters":{"rope_theta":10000.0,'
    b'"rope_type":"default"},"tie_word_embeddings":true,"transformers_version":"5.0.0","use_cache":true,'
    b'"vocab_size":257}{"method":"lossless"}{"method":"kfac","rate":0.001}{"method":"rtn","step":0.25}'
    b"lm_head.weight\nmodel.embed_tokens.weight\nmodel.layers.0.input_layernorm.weight\n"
    b"model.layers.0.mlp.down_proj.weight\nmodel.layers.0.mlp.gate_proj.weight\nmodel.layers.0.mlp.up_proj.weight\n"
    b"model.layers.0.post_attention_layernorm.weight\nmodel.layers.0.self_attn.k_proj.weight\n"
    b"model.layers.0.self_attn.o_proj.weight\nmodel.layers.0.self_attn.q_proj.weight\n"
    b"model.layers.0.self_attn.v_proj.weight\nmodel.layers.1.input_layernorm.weight\n"
    b"model.layers.1.mlp.down_proj.weight\nmodel.layers.1.mlp.gate_proj.weight\nmodel.norm.weight\n"
)
"""What configs and tensor names of common architectures contain. A constant of the format: changing a byte of it
needs a new version number."""


def encode_text(text: bytes) -> bytes:
    """Code a text section: its size, then the shortest of raw, zlib with the fixed dictionary, and LZMA2."""
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"a text of {len(text)} bytes exceeds the format's {MAX_TEXT_BYTES}")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, _DICTIONARY)
    candidates = [(RAW, text), (ZLIB, packer.compress(text) + packer.flush()), (XZ, _xz(text))]
    candidates = [item for item in candidates if len(item[1]) * TEXT_RATIO >= len(text)]
    tag, packed = min(candidates, key=lambda item: len(item[1]))
    return varint(len(text)) + bytes([tag]) + packed


def decode_text(data: bytes | memoryview, what: str) -> bytes:
    """Inverse of `encode_text`.

    Raises:
        ArtifactError: the bytes are not such a text.
    """
    reader = Reader(data, what)
    size = reader.varint(min(MAX_TEXT_BYTES, TEXT_RATIO * len(data)))
    tag = reader.byte()
    payload = reader.take(reader.remaining)
    if tag == ZLIB:
        return _unzlib(payload, size, what)
    return _decode_general(tag, payload, size, what).tobytes()


def _unzlib(payload: memoryview, size: int, what: str) -> bytes:
    unpacker = zlib.decompressobj(-15, _DICTIONARY)
    try:
        text = unpacker.decompress(payload, size + 1)
    except zlib.error as error:
        raise ArtifactError(f"artifact: {what} is not a DEFLATE stream") from error
    if len(text) != size or not unpacker.eof or unpacker.unused_data:
        raise ArtifactError(f"artifact: {what} does not unpack to the {size} bytes it declares")
    return text


# General codecs


def xz_filters(window: int) -> list[dict[str, Any]]:
    """LZMA2 at its highest level, with a window of so many bytes, within the limits of one."""
    window = min(max(window, MIN_WINDOW), MAX_WINDOW)
    return [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]


def _xz(data: Bytes | bytes) -> bytes:
    """LZMA2 with a window no wider than the data, nor than an eighth of large data: the search takes eleven windows."""
    window = min(len(data), max(FULL_WINDOW, len(data) >> 3))
    return lzma.compress(data, lzma.FORMAT_RAW, filters=xz_filters(window))  # type: ignore[arg-type]


def _unxz(payload: memoryview, size: int) -> Bytes:
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=xz_filters(size))
    out = np.empty(size, np.uint8)
    place, given = 0, payload
    while not unpacker.eof:
        part = unpacker.decompress(given, _BLOCK)
        given = payload[:0]
        if place + len(part) > size or not (part or unpacker.eof):
            raise ValueError("too long, or cut off")
        out[place : place + len(part)] = np.frombuffer(part, np.uint8)
        place += len(part)
    if unpacker.unused_data:
        raise ValueError("bytes left over")
    return out[:place]


def zstd_level(level: int) -> pa.Codec:
    """Pyarrow's zstd codec; imported late, because `inspect` and small models never need it."""
    import pyarrow as pa

    return pa.Codec("zstd", compression_level=level)


def _unzstd(payload: memoryview, size: int) -> Bytes:
    import pyarrow as pa

    return np.frombuffer(zstd_level(1).decompress(pa.py_buffer(payload), size), np.uint8)


def _unrange(payload: memoryview, size: int) -> Bytes:
    out = np.empty(size, np.uint8)
    decode_bytes(payload, out)
    return out


_DECODERS: dict[int, Callable[[memoryview, int], Bytes]] = {
    RAW: lambda payload, size: np.frombuffer(payload.toreadonly(), np.uint8),
    ZSTD: _unzstd,
    BARE: lambda payload, size: _unzstd(memoryview(ZSTD_MAGIC + payload), size),
    XZ: _unxz,
    RANGE: _unrange,
}


def _decode_general(tag: int, payload: memoryview, size: int, what: str) -> Bytes:
    if tag not in _DECODERS:
        raise ArtifactError(f"artifact: {what} is coded in a way ({tag}) that this version does not know")
    try:
        data = _DECODERS[tag](payload, size)
    except (OSError, ValueError, lzma.LZMAError, EOFError) as error:
        raise ArtifactError(f"artifact: {what} does not unpack: {error}") from error
    if len(data) != size:
        raise ArtifactError(f"artifact: {what} unpacks to {len(data)} bytes, not the {size} it declares")
    return data


def encode_general(data: Bytes, best_so_far: int | None = None) -> bytes:
    """The shortest of raw, range coder, zstd -19 and LZMA2, with a tag byte.

    Args:
        data: The bytes [n].
        best_so_far: Length of a code already in hand. If a quick zstd is not within `QUICK_MARGIN` of it, the slow
            codecs are not tried.
    """
    coded = encode_bytes(data)
    best = bytes([RANGE]) + coded if len(coded) < len(data) else bytes([RAW]) + data.tobytes()
    bar = min(len(best) - 1, len(data) if best_so_far is None else best_so_far)
    quick = len(zstd_level(3).compress(data)) if len(data) else 0
    if quick <= bar * QUICK_MARGIN:
        best = min(best, bytes([BARE]) + zstd_level(19).compress(data, asbytes=True)[len(ZSTD_MAGIC) :], key=len)
        best = min(best, bytes([XZ]) + _xz(data), key=len)
    return best


def promising_general(data: Bytes, best_so_far: int, margin: float) -> bytes | None:
    """A general codec's code of large data, if one promises to be shorter by more than `WORTH_TRYING`.

    LZMA2 and zstd -19 see a sample only if a quick zstd of it, or LZMA2 of a small part, comes close to the code in
    hand, and the better of them sees everything only if it is better than that. What repeats at a distance is not in
    a sample; where much does, everything is given to both.

    Args:
        data: The bytes [n].
        best_so_far: Length of a code already in hand.
        margin: How close they must come to it: `QUICK_FLOATS` where general codecs are at their worst, or
            `QUICK_MARGIN`.
    """
    ends = np.linspace(0, max(0, len(data) - SAMPLE_RUN), SAMPLE_RUNS).astype(np.int64) & -_GROUP_BYTES
    sample = np.concatenate([data[start : start + SAMPLE_RUN] for start in ends.tolist()])
    bar = best_so_far / len(data) * len(sample)
    slow: list[Callable[[Bytes], bytes]] = [_bare_zstd, _tagged_xz]
    part = sample[SAMPLE_RUN : SAMPLE_RUN + SMALL_SAMPLE]
    quick = min(len(zstd_level(3).compress(sample)) / len(sample), len(_xz(part)) / max(1, len(part)))
    if quick <= margin * best_so_far / len(data):
        best = min(slow, key=lambda code: len(code(sample)))
        slow = [best] if len(best(sample)) <= (1 - WORTH_TRYING) * bar else []
    elif _repeated_share(data) < WORTH_TRYING:
        slow = []
    return min((code(data) for code in slow), key=len, default=None)


def _bare_zstd(data: Bytes) -> bytes:
    coded: bytes = zstd_level(19).compress(data, asbytes=True)
    return bytes([BARE]) + coded[len(ZSTD_MAGIC) :]


def _tagged_xz(data: Bytes) -> bytes:
    return bytes([XZ]) + _xz(data)


def _repeated_share(data: Bytes) -> float:
    """About what part of the data, in groups of 32 bytes, stood before; looked at in one group of sixteen."""
    words = data[: len(data) // _GROUP_BYTES * _GROUP_BYTES].view(np.uint64).reshape(-1, 4)
    mixed = np.zeros(len(words), np.uint64)
    for column in range(4):
        mixed = (mixed ^ words[:, column]) * _MIXER
        mixed ^= mixed >> np.uint64(29)
    looked_at = mixed[mixed >> np.uint64(60) == 0]
    return 1 - len(np.unique(looked_at)) / max(1, len(looked_at))


def decode_general(payload: memoryview, size: int, what: str) -> Bytes:
    """Inverse of `encode_general`, given how many bytes come out.

    Raises:
        ArtifactError: the bytes are not such a code of that many bytes.
    """
    reader = Reader(payload, what)
    return _decode_general(reader.byte(), reader.take(reader.remaining), size, what)


# Adaptive order-0 coding


_PRIOR: Ints = np.full((2, 256), 32, np.int64)
"""An eighth of an observation each, in two contexts."""


def encode_bytes(data: Bytes, contexts: Bytes | None = None) -> bytes:
    """Range-code bytes under an adaptive histogram for each context.

    Args:
        data: [n].
        contexts: 0 or 1 for each byte, known to the decoder too; None for 0 throughout.
    """
    run = WritingPass(_PRIOR)
    _code_bytes(run, data, contexts, reading=False)
    return run.finish()


def decode_bytes(payload: bytes | memoryview, out: Bytes, contexts: Bytes | None = None) -> None:
    """Inverse of `encode_bytes`, into an array of the right length."""
    _code_bytes(ReadingPass(_PRIOR, payload), out, contexts, reading=True)


def _code_bytes(run: Pass, data: Bytes, contexts: Bytes | None, *, reading: bool) -> None:
    start = 0
    while start < len(data):
        stop = min(len(data), start + min(_BLOCK, max(16, start // 8)))
        tokens = None if reading else data[start:stop].astype(np.int32)
        got = run.code(tokens, None if contexts is None else contexts[start:stop], stop - start)
        if reading:
            data[start:stop] = got
        start = stop


def entropy_bytes(data: Bytes) -> float:
    """Empirical entropy of the bytes' histogram, in bytes; an estimate to choose a code by, never part of one."""
    counts = np.zeros(256, np.int64)
    for start in range(0, len(data), _BLOCK):
        counts += np.bincount(data[start : start + _BLOCK], minlength=256)
    bits: float = sum(n * log2(len(data) / n) for n in counts.tolist() if n)
    return bits / 8
