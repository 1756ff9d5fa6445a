"""Whether layers that bring their weights bring those of a dense model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tokenbound.compression.artifact import encode_artifact
from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.config.compress import LosslessSettings
from tokenbound.models.blocks import build_chain
from tokenbound.models.build import build_model
from tokenbound.models.checkpoint import Checkpoint
from tokenbound.models.packed_file import PackedFile, write_packed
from tokenbound.models.sources import MapSource, PackedFileSource, PackedSource

CPU = torch.device("cpu")


def packed_file(artifact: ArtifactFile) -> PackedFile:
    """Its packed weights in a file that has no name any more."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.packed"
        write_packed(path, artifact)
        return PackedFile(path)


def require_same_weights(found: Checkpoint, dtype: torch.dtype) -> None:
    """Every weight that a chain loads, streamed or packed, is that of the dense model, bit for bit."""
    artifact = ArtifactFile(encode_artifact(found.architecture, found.tensors, LosslessSettings()))
    expected = build_model(found.architecture, found.tensors, dtype=dtype, device="cpu").state_dict()
    file = packed_file(artifact)
    in_file = [PackedFileSource(artifact, file, CPU, resident=resident) for resident in (True, False)]
    for source in (MapSource(artifact.tensors), PackedSource(artifact, CPU), *in_file):
        chain = build_chain(artifact.architecture, source, dtype=dtype, device=CPU)
        for index in range(len(chain.blocks)):
            chain.load(index)
        loaded = chain.model.state_dict()
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (loaded[name].dtype, loaded[name].stride()) == (tensor.dtype, tensor.stride()), name
            assert tensor_bytes(loaded[name]).tobytes() == tensor_bytes(tensor).tobytes(), name
