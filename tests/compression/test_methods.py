"""Methods are found, told apart by what they need, and may come from another package."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from method_support import BROKEN, SIGN, install
from pydantic import ValidationError
from typer.main import get_group

from tokenbound.cli import app
from tokenbound.compression import methods
from tokenbound.compression.artifact import decode_artifact, encode_artifact, parse_artifact
from tokenbound.compression.calibration import Calibration
from tokenbound.compression.codecs import CODECS, UNIFORM
from tokenbound.compression.inspection import inspect_artifact
from tokenbound.compression.methods import METHODS, CompressionMethod, SearchMethod, built_in_methods
from tokenbound.compression.methods.auto import AutoSettings
from tokenbound.compression.tensor import encode_tensor
from tokenbound.config.compress import KfacSettings, LosslessSettings, RoundToNearestSettings
from tokenbound.config.run import CompressChoice, ModelConfig, PretrainConfig, dump_config, validate
from tokenbound.errors import InputError
from tokenbound.plugins import plugins_used

FOLDER = Path(methods.__file__).parent
BUILT_IN = list(METHODS.built_in.values())
WEIGHT = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The methods `sign` and `broken`, each of a distribution; forgotten afterwards."""
    folder = install(tmp_path / "site", module="toy_sign", text=SIGN, methods={"sign": "SignMethod"})
    install(folder, module="toy_broken", text=BROKEN, methods={"broken": "BrokenMethod"}, name="junk", version="0.1")
    monkeypatch.syspath_prepend(folder)
    METHODS.forget()
    yield folder
    METHODS.forget()
    for name in ("toy_sign", "toy_broken"):
        sys.modules.pop(name, None)


def chosen(**compress: Any) -> Any:
    return validate(CompressChoice, {"compress": compress}, origin="test").compress


# --- The built-in methods -------------------------------------------------------------------------------------------


def test_every_file_of_the_folder_is_a_method_of_its_name() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "base"}
    assert files == set(METHODS.built_in) == {"auto", "e8", "gptq", "kfac", "lossless", "rtn"}
    for name, method in METHODS.built_in.items():
        assert method.name == name
        assert method.__module__ == f"tokenbound.compression.methods.{name}"
        assert METHODS.origin(name) is None


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_config_can_be_validated_without_numpy_and_torch(path: Path) -> None:
    tree = ast.parse(path.read_text())
    found = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    heavy = {"numpy", "torch", "tokenbound.compression.codecs", "tokenbound.compression.quantizers"}
    assert not {name for name in found if name in heavy or name.startswith(tuple(f"{each}." for each in heavy))}


@pytest.mark.parametrize("method", BUILT_IN, ids=lambda method: method.name)
def test_a_method_is_what_it_says(method: type[CompressionMethod]) -> None:
    settings = method()
    if method.is_search:
        assert isinstance(settings, SearchMethod)
        with pytest.raises(InputError, match="searches over whole artifacts"):
            encode_tensor("w", WEIGHT, settings, Calibration(tokens=1))
        return
    if method.needs_calibration:
        with pytest.raises(InputError, match=f"`{method.name}` needs a calibration"):
            encode_tensor("w", WEIGHT, settings)
    coded = encode_tensor("w", WEIGHT, settings, Calibration(tokens=1))
    assert (coded.codec == UNIFORM) == method.writes_grid
    decoded = decode_artifact(encode_artifact({}, {"w": WEIGHT}, settings, calibration=Calibration(tokens=1)))
    assert torch.equal(decoded.tensors["w"], WEIGHT) == method.is_exact


def test_messages_name_the_methods_that_a_user_may_choose() -> None:
    assert built_in_methods() == "rtn, lossless, kfac, gptq, e8 or auto"
    assert built_in_methods(lambda method: method.codes_adapters) == "rtn, lossless or auto"
    assert built_in_methods(lambda method: method.writes_grid) == "rtn, kfac or auto"
    assert built_in_methods(lambda method: method.needs_calibration) == "kfac, gptq, e8 or auto"
    assert built_in_methods(lambda method: method.is_exact) == "lossless"


def test_the_command_line_names_the_methods() -> None:
    options = {name: option for option in get_group(app).commands["compress"].params for name in option.opts}
    assert built_in_methods() in options["--method"].help
    assert built_in_methods(lambda method: method.needs_calibration) in options["--config"].help


def test_auto_searches_a_setting_of_another_method() -> None:
    space = AutoSettings(low=1e-4, high=1e-2, tries=3).space(of_adapter=False)
    assert (space.setting, space.low, space.high, space.tries) == ("rate", 1e-4, 1e-2, 3)
    assert space.method(0.5) == KfacSettings(rate=0.5)
    space = AutoSettings(tries=4).space(of_adapter=True)
    assert (space.setting, space.tries, space.limits) == ("step", 4, None)
    assert space.method(0.5) == RoundToNearestSettings(step=0.5)


def test_wire_numbers_never_change() -> None:
    names = {number: codec.name for number, codec in CODECS.items()}
    assert names == dict(enumerate(["exact", "uniform", "groups", "lattice", "float16", "packed", "n-grams", "ggml"]))


def test_an_unknown_method_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match=r"compress: there is no compression method 'rnt'; .*kfac, lossless, rtn"):
        chosen(method="rnt")
    with pytest.raises(InputError, match="compress"):
        chosen(step=0.5)


def test_an_unknown_option_is_answered_with_those_of_its_own_method() -> None:
    with pytest.raises(
        InputError, match=r"compress\.rtn\.rate: unknown key \(got 0\.1\); the keys here are method, step"
    ):
        chosen(method="rtn", rate=0.1)


# --- Methods of other packages --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("toy")
def test_a_plugin_is_configured_like_a_built_in_method() -> None:
    settings = chosen(method="sign", scale=2)
    assert (settings.name, settings.scale) == ("sign", 2.0)
    assert not settings.needs_calibration
    model = ModelConfig(checkpoint="x", compress={"method": "sign"})
    assert yaml.safe_load(dump_config(model))["compress"] == {"method": "sign", "scale": 1.0}
    assert ModelConfig.model_validate(yaml.safe_load(dump_config(model))) == model
    assert ModelConfig(checkpoint="x", compress=settings).compress is settings
    assert "sign" in METHODS.names()
    assert plugins_used((METHODS, ["sign", "rtn"])) == {"tokenbound.methods": {"sign": "toy 1.0"}}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("compress", "words"),
    [
        ({"method": "sign", "scael": 2}, r"compress\.sign\.scael: unknown key \(got 2\); did you mean `scale`\?"),
        ({"method": "sign", "depth": 2}, r"compress\.sign\.depth: .*the keys here are method, scale"),
        ({"method": "sign", "scale": -1}, r"compress\.sign\.scale: Input should be greater than 0 \(got -1\)"),
        ({"method": "sing"}, r"compress: there is no compression method 'sing'; choose one of .*rtn, broken, sign"),
    ],
)
def test_settings_of_a_plugin_have_errors_like_others(compress: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        chosen(**compress)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("compress", [{"method": "rtn", "step": "2"}, {"method": "sign", "scale": "2"}])
def test_a_number_as_text_is_no_setting_in_json(compress: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="valid number"):
        CompressChoice.model_validate_json(json.dumps({"compress": compress}), strict=True)
    compress = {name: 2 if value == "2" else value for name, value in compress.items()}
    CompressChoice.model_validate_json(json.dumps({"compress": compress}), strict=True)


def pretrain(method: str, **sections: Any) -> PretrainConfig:
    corpus = {"source": "text", "paths": ["x"], "tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False}
    what = {"corpus": {**corpus, "add_eos": True}, "compress": {"method": method}, **sections}
    return validate(PretrainConfig, {"what": what, "how": {"output": "x"}}, origin="test")


@pytest.mark.usefixtures("toy")
def test_only_a_grid_can_be_finished() -> None:
    finish = {"start": "x", "finish": {"tokens": 100, "nats_per_bit": 0.1}}
    for method in ("rtn", "kfac", "auto"):
        assert pretrain(method, **finish).what.encoding.name == method
    for method in ("lossless", "gptq", "e8", "sign"):
        with pytest.raises(InputError, match=r"`compress\.method` rtn, kfac or auto: the others have no grid to train"):
            pretrain(method, **finish)


@pytest.mark.usefixtures("toy")
def test_an_adapter_is_coded_without_a_calibration() -> None:
    adapter = {"base": "x", "family": {"kind": "lora"}, "training": {"tokens": 100}}
    for method in ("rtn", "lossless", "sign"):
        assert pretrain(method, **adapter).what.encoding.name == method
    for method in ("kfac", "gptq", "e8", "auto"):
        with pytest.raises(InputError, match=r"`compress\.method` is rtn or lossless: the others need whole weights"):
            pretrain(method, **adapter)


def test_artifacts_of_a_plugin_name_it_and_are_decoded_without_it(toy: Path) -> None:
    data = encode_artifact({}, {"w": WEIGHT, "n": torch.arange(5)}, chosen(method="sign"))
    for name in ("toy_sign", "toy_broken"):
        (toy / f"{name}.py").unlink()
        sys.modules.pop(name, None)
    parsed = parse_artifact(data)
    assert parsed.settings == {"method": "sign", "scale": 1.0, "plugin": "toy 1.0"}
    assert methods.plugins_of(parsed.settings) == {"tokenbound.methods": {"sign": "toy 1.0"}}
    assert {row.name: row.codec for row in inspect_artifact(data).tensors}["w"] == "uniform"
    tensors = decode_artifact(data).tensors
    assert torch.equal(tensors["w"].sign(), WEIGHT.sign())
    assert float(tensors["w"].abs().max()) == pytest.approx(float(WEIGHT.abs().mean()), rel=0.2)
    assert torch.equal(tensors["n"], torch.arange(5))
    assert len(data) < WEIGHT.numel() / 8 + 200


def test_artifacts_of_built_in_methods_name_no_plugin() -> None:
    parsed = parse_artifact(encode_artifact({}, {"w": WEIGHT}, LosslessSettings()))
    assert parsed.settings == {"method": "lossless"}
    assert methods.plugins_of(parsed.settings) == {}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("codec", [1, 77])
def test_a_plugin_that_writes_junk_is_found_out_while_it_encodes(codec: int) -> None:
    with pytest.raises(InputError, match=r"`broken` of junk 0\.1 wrote a code of tensor 'w' that cannot be decoded"):
        encode_tensor("w", WEIGHT, chosen(method="broken", codec=codec))


def test_a_plugin_may_not_take_the_name_of_a_built_in_method(toy: Path) -> None:
    install(toy, module="toy_rtn", methods={"rtn": "Rtn"}, name="thief")
    importlib.invalidate_caches()
    with pytest.raises(InputError, match=r"compression method 'rtn' is offered by tokenbound and by thief 1\.0"):
        chosen(method="rtn")


def test_a_plugin_that_cannot_be_imported_stops_only_who_asks_for_it(toy: Path) -> None:
    install(toy, module="toy_lost", text="import no_such_module", methods={"lost": "Lost"}, name="lost")
    importlib.invalidate_caches()
    with pytest.raises(InputError, match=r"'lost' of lost 1\.0 .*No module named 'no_such_module'"):
        chosen(method="lost")
    assert np.isclose(chosen(method="rtn").step, 0.25)


def test_a_method_that_is_not_installed_encodes_nothing(toy: Path) -> None:
    settings = chosen(method="sign")
    for folder in toy.glob("*.dist-info"):
        (folder / "entry_points.txt").unlink()
    importlib.invalidate_caches()
    with pytest.raises(InputError, match="there is no compression method 'sign'"):
        encode_artifact({}, {"w": WEIGHT}, settings)


def test_a_setting_may_not_have_the_name_of_the_record() -> None:
    with pytest.raises(TypeError, match="cannot have a field 'plugin'"):

        class Clash(RoundToNearestSettings):
            plugin: int = 0
