"""The coder against an integer range coder written out here, against entropy, and against damaged streams."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokenbound.compression.coder import TOTAL, ReadingPass, WritingPass, frequencies
from tokenbound.compression.container import ArtifactError
from tokenbound.compression.integers import (
    BUCKETS,
    decode_matrix,
    decode_vector,
    encode_matrix,
    encode_vector,
    prior_counts,
)
from tokenbound.compression.symbols import (
    BLOCK_ELEMENTS,
    MAX_BITS,
    BitReader,
    BitWriter,
    alphabet_size,
    join_integers,
    split_integers,
    tokenize,
    values_of,
)

MASK = (1 << 64) - 1


class IntegerRangeEncoder:
    """Range coder with 64 bits of state and 32-bit words, in Python integers only."""

    def __init__(self) -> None:
        self.low, self.range = 0, MASK
        self.words: list[int] = []
        self.held: tuple[int, int] | None = None  # first word and number of words that a carry may still change

    def encode(self, left: int, width: int) -> None:
        scale = self.range >> 24
        low = (self.low + scale * left) & MASK
        self.range = scale * width
        if self.held is not None and (low + self.range) & MASK > low:
            carry = low < self.low
            first, count = self.held
            self.words += [(first + carry) & 0xFFFFFFFF] + [0 if carry else 0xFFFFFFFF] * (count - 1)
            self.held = None
        self.low = low
        if self.range < 1 << 32:
            word, self.low, self.range = low >> 32, (low << 32) & MASK, self.range << 32
            if self.held is not None:
                self.held = (self.held[0], self.held[1] + 1)
            elif (self.low + self.range) & MASK > self.low:
                self.words.append(word)
            else:
                self.held = (word, 1)


def empirical_bytes(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


@pytest.mark.parametrize("alphabet", [3, 31, 256])
def test_constriction_codes_under_exactly_the_integer_frequencies_it_is_given(alphabet: int) -> None:
    rng = np.random.default_rng(alphabet)
    counts = rng.integers(1, 5000, (1, alphabet)) ** 2
    tokens = rng.choice(alphabet, p=(counts / counts.sum())[0], size=20_000).astype(np.int32)
    run = WritingPass(counts)
    run.code(tokens, None)
    shares = frequencies(counts)[0] + 1
    assert shares.sum() == TOTAL
    left = np.concatenate([[0], np.cumsum(shares)])
    reference = IntegerRangeEncoder()
    for token in tokens.tolist():
        reference.encode(int(left[token]), int(shares[token]))
    words = np.array(reference.words, dtype="<u4").tobytes()
    assert run.finish()[: len(words)] == words
    assert len(words) > 800


def test_frequencies_do_not_depend_on_floating_point() -> None:
    counts = np.array([[1, 2, 3], [1 << 29, 1, 1]])
    assert frequencies(counts).tolist() == [[2796202, 5592404, 8388607], [16777213, 0, 0]]


@pytest.mark.parametrize(
    ("shape", "spread", "allowed"),
    [((512, 128), 0.6, 1.01), ((128, 128), 0.6, 1.02), ((64, 512), 4.0, 1.02), ((2048, 256), 1.5, 1.002)],
)
def test_iid_matrices_cost_little_more_than_their_entropy(
    shape: tuple[int, int], spread: float, allowed: float
) -> None:
    values = np.rint(np.random.default_rng(5).normal(size=shape) * spread).astype(np.int64)
    coded = encode_matrix(values)
    assert np.array_equal(decode_matrix(coded, shape), values)
    assert len(coded) <= allowed * empirical_bytes(values)


@pytest.mark.parametrize("axis", [0, 1])
def test_contexts_find_rows_or_columns_of_unequal_size(axis: int) -> None:
    rng = np.random.default_rng(6)
    scale = np.exp(rng.normal(size=(256, 1) if axis == 0 else (1, 192)))
    values = np.rint(rng.normal(size=(256, 192)) * scale).astype(np.int64)
    assert len(encode_matrix(values)) < 0.88 * empirical_bytes(values)


def test_known_exponents_replace_learning() -> None:
    rng = np.random.default_rng(7)
    rows, columns = rng.integers(-3, 4, 96), rng.integers(-3, 4, 64)
    values = np.rint(rng.normal(size=(96, 64)) * 2 * 2 ** (-(rows[:, None] + columns[None, :]) / 2)).astype(np.int64)
    known = encode_matrix(values, rows, columns)
    assert np.array_equal(decode_matrix(known, values.shape, rows, columns), values)
    assert len(known) < 0.97 * len(encode_matrix(values))


def test_extreme_exponents_wrap_nothing_around() -> None:
    exponents = np.linspace(-40, 40, 60).astype(np.int64)
    values = np.full((60, 60), 900)
    for rows, columns in ((exponents, exponents), (exponents, -exponents), (0 * exponents - 40, exponents)):
        coded = encode_matrix(values, rows, columns)
        assert np.array_equal(decode_matrix(coded, values.shape, rows, columns), values)


def test_a_mean_that_the_encoder_does_not_write_is_refused() -> None:
    coded = bytearray(encode_matrix(np.ones((40, 40), np.int64)))
    coded[1] = 63
    with pytest.raises(ArtifactError, match="header"):
        decode_matrix(bytes(coded), (40, 40))


integers = st.one_of(st.integers(-3, 3), st.integers(-40, 40), st.integers(-(1 << MAX_BITS) + 1, (1 << MAX_BITS) - 1))


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=12), elements=integers))
def test_any_matrix_survives(values: np.ndarray) -> None:
    assert np.array_equal(decode_matrix(encode_matrix(values), values.shape), values)


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.int64, st.integers(0, 40), elements=st.integers(-(1 << 29), 1 << 29)))
def test_any_vector_survives(values: np.ndarray) -> None:
    assert np.array_equal(decode_vector(encode_vector(values), len(values)), values)


def test_many_tiles_and_steps_survive() -> None:
    rng = np.random.default_rng(8)
    for shape in ((9000, 5), (5, 9000), (1200, 40)):
        values = np.rint(rng.standard_cauchy(shape)).clip(-(10**6), 10**6).astype(np.int64)
        assert np.array_equal(decode_matrix(encode_matrix(values), shape), values)


@given(st.integers(5, MAX_BITS), st.data())
def test_tokens_and_raw_bits_are_a_bijection(max_bits: int, data: st.DataObject) -> None:
    limit = (1 << max_bits) - 1
    values = data.draw(hnp.arrays(np.int64, 20, elements=st.integers(-limit, limit)))
    tokens, low, _ = split_integers(values, max_bits)
    assert tokens.min() >= 0
    assert tokens.max() < alphabet_size(max_bits) <= 256
    assert np.array_equal(join_integers(tokens, max_bits, low), values)


@given(st.lists(st.tuples(st.integers(0, 28), st.integers(0, (1 << 28) - 1)), max_size=60), st.integers(0, 60))
def test_raw_bits_are_their_binary_digits_wherever_they_are_cut(fields: list[tuple[int, int]], cut: int) -> None:
    widths = np.array([width for width, _ in fields], np.int64)
    values = np.array([value & ((1 << width) - 1) for width, value in fields], np.int64)
    writer = BitWriter()
    writer.add(values[:cut], widths[:cut])
    writer.add(values[cut:], widths[cut:])
    digits = "".join(f"{v:0{w}b}" for v, w in zip(values.tolist(), widths.tolist(), strict=True) if w)
    packed = writer.finish()
    assert packed == int((digits + "0" * (-len(digits) % 8)) or "0", 2).to_bytes(-(-len(digits) // 8))
    reader = BitReader(packed)
    assert reader.take(widths[:cut]).tolist() == values[:cut].tolist()
    assert reader.take(widths[cut:]).tolist() == values[cut:].tolist()
    reader.finish()


@pytest.mark.parametrize("shape", [(3, BLOCK_ELEMENTS + 5), (BLOCK_ELEMENTS // 2 + 3, 3), (1, 7), (0, 5)])
def test_a_matrix_in_parts_is_the_matrix(shape: tuple[int, int]) -> None:
    values = np.rint(np.random.default_rng(1).standard_cauchy(shape) * 9).clip(-(10**6), 10**6).astype(np.int64)
    tokens, raw = tokenize(values, 20)
    whole = np.full(shape, 1 << 40)
    for cut, part in values_of(tokens, raw, 20):
        assert part.size <= BLOCK_ELEMENTS
        whole[cut] = part
    assert np.array_equal(whole, values)
    if values.size:
        with pytest.raises(ArtifactError, match="raw bits"):
            list(values_of(tokens, raw[:-1], 20))
        with pytest.raises(ArtifactError, match="raw bits"):
            list(values_of(tokens, raw + b"a", 20))


@pytest.mark.parametrize("max_bits", [1, 2, 4, 5, 12, MAX_BITS])
def test_priors_are_laws_with_the_mean_of_their_bucket(max_bits: int) -> None:
    table = prior_counts(max_bits)
    assert table.shape == (BUCKETS, alphabet_size(max_bits))
    assert (table > 0).all()
    if max_bits >= 5:
        magnitudes = np.abs(np.arange(-15, 16))
        for bucket in range(10, 17):
            mean = (table[bucket, :31] * magnitudes).sum() / table[bucket].sum()
            assert 0.9 * 2 ** (bucket / 2 - 8) < mean < 1.1 * 2 ** (bucket / 2 - 7.5)


def test_trailing_zero_bytes_are_not_stored_and_not_missed() -> None:
    prior = np.full((1, 4), 256, np.int64)
    found = 0
    for seed in range(40):
        tokens = np.random.default_rng(seed).integers(0, 4, 60).astype(np.int32)
        tokens[seed:] = 0
        run = WritingPass(prior)
        run.code(tokens, None)
        coded = run.finish()
        found += len(coded) % 4 != 0
        assert np.array_equal(ReadingPass(prior, coded).code(None, None, 60), tokens)
    assert found


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 40), st.integers(0, 40))
def test_hostile_matrix_streams_end_in_values_or_a_clear_error(data: bytes, rows: int, columns: int) -> None:
    try:
        values = decode_matrix(data, (rows, columns))
    except ArtifactError:
        return
    assert values.shape == (rows, columns)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 60))
def test_hostile_vector_streams_end_in_values_or_a_clear_error(data: bytes, length: int) -> None:
    try:
        values = decode_vector(data, length)
    except ArtifactError:
        return
    assert values.shape == (length,)
