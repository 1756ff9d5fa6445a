"""Tensors decoded by several processes are those that one decodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tokenbound.compression import decode_pool
from tokenbound.compression.artifact import decode_artifact, parse_artifact
from tokenbound.compression.container import ArtifactError
from tokenbound.compression.dtypes import tensor_bytes

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.slow  # for a process needs seconds to start
def test_processes_share_the_tensors_of_an_artifact() -> None:
    data = (GOLDEN / "every_codec.tokenbound").read_bytes()
    alone = decode_artifact(data)
    decoded = decode_pool.decode_in_processes(parse_artifact(data).coded, 2)
    together = {item.name: tensor for item, tensor in decoded}
    assert set(together) == set(alone.tensors)
    for name, tensor in alone.tensors.items():
        other = together[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        assert np.array_equal(tensor_bytes(other), tensor_bytes(tensor))


@pytest.mark.slow
def test_the_error_of_a_process_names_the_tensor() -> None:
    coded = list(parse_artifact((GOLDEN / "every_codec.tokenbound").read_bytes()).coded)
    coded[3] = replace(coded[3], payload=coded[3].payload[:-5])
    with pytest.raises(ArtifactError, match=coded[3].name):
        list(decode_pool.decode_in_processes(coded, 2))


def test_processes_are_started_where_there_is_much_to_decode() -> None:
    coded = parse_artifact((GOLDEN / "every_codec.tokenbound").read_bytes()).coded
    assert decode_pool.num_processes(coded, 8) == 1
    large = [replace(coded[0], shape=(decode_pool.WORTH_ELEMENTS,))]
    assert [decode_pool.num_processes(large, workers) for workers in (0, 1, 8)] == [1, 1, 8]
