"""A method of compression from a package of its own, as it would be installed."""

from __future__ import annotations

from pathlib import Path

SIGN = '''
"""Keep the signs of a matrix, and one magnitude for all of it."""

from typing import Literal

from pydantic import Field

from tokenbound.compression.methods import CompressionMethod


class SignMethod(CompressionMethod):
    """Signs times the mean magnitude."""

    method: Literal["sign"] = "sign"
    scale: float = Field(default=1.0, gt=0)
    """Of the magnitude."""

    def encode(self, name, tensor, calibration):
        import numpy as np

        from tokenbound.compression.codecs.select import code_exact, code_grid
        from tokenbound.compression.codecs.uniform import Grid, step_exponent

        if not tensor.is_floating_point() or tensor.ndim != 2:
            return code_exact(tensor)
        magnitude = self.scale * float(tensor.float().abs().mean())
        return code_grid(tensor, Grid(tensor.float().sign().numpy().astype(np.int8), step_exponent(magnitude)))
'''
"""The whole of it: one class."""

BROKEN = """
from typing import Literal

from tokenbound.compression.methods import CompressionMethod


class BrokenMethod(CompressionMethod):
    method: Literal["broken"] = "broken"
    codec: int = 1

    def encode(self, name, tensor, calibration):
        return self.codec, b"junk"
"""


def install(
    folder: Path, *, module: str, text: str = "", methods: dict[str, str], name: str = "toy", version: str = "1.0"
) -> Path:
    """Install a distribution into a folder of Python's path.

    Args:
        folder: The folder.
        module: Name of its one module.
        text: The module.
        methods: Names of methods, and the class of each in the module.
        name: Of the distribution.
        version: Of the distribution.
    """
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(text)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    entries = "".join(f"{method} = {module}:{found}\n" for method, found in methods.items())
    (info / "entry_points.txt").write_text(f"[tokenbound.methods]\n{entries}")
    return folder
