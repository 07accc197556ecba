"""Configs are read strictly: what is wrong is named, with its rule and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import configs
from felrec_dist.config import dump_config, load_config, parse_config, with_absolute_paths
from felrec_dist.errors import ConfigError

FILES = sorted(Path(configs.__path__[0]).glob("*.yaml"))
MINIMAL: dict[str, dict[str, Any]] = {
    "data": {"url": "data", "batch_size": 8},
    "run": {"url": "run"},
}
MINIMAL_YAML = "data: {url: data, batch_size: 8}\nrun: {url: run}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL_YAML)
    return path


def merged(changes: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {**MINIMAL}
    for section, values in changes.items():
        is_tree = isinstance(values, dict)
        tree[section] = {**MINIMAL.get(section, {}), **values} if is_tree else values
    return tree


def test_there_are_configs() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_of_the_folder_loads(path: Path) -> None:
    config = load_config(str(path))
    assert path.stem.startswith(Path(config.run.url).name), "a run is named after its config"


def test_defaults_are_those_of_the_paper() -> None:
    config = parse_config(MINIMAL, where="test")
    encoder, schedule = config.felrec.encoder, config.training.schedule
    assert (encoder.history_length, encoder.width, encoder.feedforward_width) == (64, 128, 256)
    assert (encoder.num_layers, encoder.num_heads, encoder.dropout) == (3, 4, 0.1)
    assert (config.felrec.queue_size, config.felrec.temperature) == (8192, 0.07)
    assert (schedule.kind, schedule.base_lr, schedule.eta_min) == ("step", 0.01, 1e-7)
    assert (schedule.epochs, schedule.warmup_epochs) == (100, 10)
    assert (config.training.optimizer, config.training.momentum) == ("sgd", 0.9)
    assert config.training.grad_clip_value == 1.0
    assert (config.evaluation.protocol, config.evaluation.num_negatives) == ("causal", 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainning": {}}, r"unknown config key trainning\n(.*\n)*.*did you mean training\?"),
        (
            {"model": {"encoder": {"widht": 8}}},
            r"unknown config key model\.encoder\.widht\n(.*\n)*.*did you mean width\?",
        ),
        (
            {"training": {"schedule": {"warmup_epoch": 1}}},
            r"unknown config key training\.schedule\.warmup_epoch\n(.*\n)*"
            r".*expected: one of kind, base_lr, .*\n.*did you mean warmup_epochs\?",
        ),
        # Nothing is near: only what there is.
        ({"run": {"qqqqq": 1}}, r"unknown config key run\.qqqqq\n.*\n  expected: one of url, .*$"),
        ({"data": {"batch_size": "8"}}, r"data\.batch_size breaks(.*\n)*.*valid integer"),
        ({"data": {"batch_size": True}}, r"data\.batch_size breaks(.*\n)*.*valid integer"),
        ({"data": {"batch_size": 8.0}}, r"data\.batch_size breaks(.*\n)*.*valid integer"),
        ({"data": {"url": 7}}, r"data\.url breaks(.*\n)*.*got: 7\n.*valid string"),
        ({"data": [1]}, r"config value data breaks(.*\n)*.*valid dictionary"),
        ({"training": {"seed": -1}}, r"training\.seed breaks(.*\n)*  got: -1\n.*greater than"),
        ({"training": {"schedule": {"base_lr": float("nan")}}}, r"base_lr breaks(.*\n)*.*finite"),
        (
            {"model": {"variant": "felrec-x"}},
            r"config value model(.*\n)*.*'felrec-q', 'felrec-p', 'bpr-mf'",
        ),
        ({"cache": {"num_shards": 4097}}, r"num_shards breaks(.*\n)*  got: 4097"),
        (
            {"model": {"encoder": {"width": 8, "num_heads": 3}}},
            r"model\.encoder breaks(.*\n)*.*num_heads = 3 must divide width = 8",
        ),
        (
            {"training": {"schedule": {"epochs": 5, "warmup_epochs": 5}}},
            r"training\.schedule breaks(.*\n)*.*warmup_epochs = 5 must be below epochs = 5",
        ),
        (
            {"training": {"schedule": {"base_lr": 1e-3, "eta_min": 1e-2}}},
            r"eta_min = 0\.01 must not be above base_lr = 0\.001",
        ),
        (
            {"cluster": {"num_workers": 3}},
            r"data\.batch_size = 8 must be a multiple of cluster\.num_workers = 3",
        ),
        ({"data": {"batch_size": 1}}, r"data\.batch_size must be 2 or more"),
        ({"cache": {"block_rows": 24}}, r"cache\.block_rows(.*\n)*.*24 must be a power of two"),
        ({"cache": {"spill_dir": "/tmp"}}, r"memory_per_shard_gb = None need each other"),
        ({"cache": {"memory_per_shard_gb": 1.0}}, r"spill_dir = None and(.*\n)*.*need each other"),
        ({"cache": {"block_rows": 0}}, r"cache\.block_rows(.*\n)*.*greater than or equal to 1"),
    ],
)
def test_a_broken_rule_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(merged(changes), where="experiment.yaml")
    assert caught.value.where == "experiment.yaml"


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"config key run is missing(.*\n)*.*set run=\.\.\."):
        parse_config({"data": {"url": "data"}}, where="test")
    with pytest.raises(ConfigError, match=r"config key data\.url is missing"):
        parse_config({"data": {}, "run": {"url": "run"}}, where="test")


@pytest.mark.parametrize("text", ["1e-7", "1.e-7", "1E-07", "+1e-7", "0.0000001", ".1e-6"])
def test_a_number_with_an_exponent_is_a_number(file: Path, text: str) -> None:
    file.write_text(MINIMAL_YAML + f"training: {{schedule: {{eta_min: {text}}}}}\n")
    assert load_config(str(file)).training.schedule.eta_min == 1e-7
    override = f"training.schedule.base_lr={text}"
    assert load_config(str(file), [override]).training.schedule.base_lr == 1e-7


@pytest.mark.parametrize("text", ["e-7", "1e", "0x1e-7", "1e-7s"])
def test_what_only_looks_like_a_number_is_none(file: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="valid number"):
        load_config(str(file), [f"training.schedule.base_lr={text}"])


def test_overrides_are_laid_over_the_file(file: Path) -> None:
    config = load_config(
        str(file),
        [
            "training.schedule.epochs=3",
            "training.schedule.warmup_epochs=0",
            "model.encoder={width: 8, num_heads: 2}",
            "model.encoder.num_layers=1",
            "run.url=memory://a=b",
            "training.seed=1",
            "training.seed=2",
        ],
    )
    assert (config.training.schedule.epochs, config.training.schedule.warmup_epochs) == (3, 0)
    encoder = config.felrec.encoder
    assert (encoder.width, encoder.num_heads, encoder.num_layers) == (8, 2, 1)
    assert config.run.url == "memory://a=b"
    assert config.training.seed == 2, "the last one counts"
    assert config.data.url == "data", "what is not named stays"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed", r"an override has no value\n.*\n  got: training\.seed\n.*key=value"),
        ("=3", r"an override has no value(.*\n)*  got: =3"),
        (
            "data.url.x=1",
            r"an override goes through a value\n  where: data\.url\.x\n.*url = 'data'",
        ),
        (
            "training.seed={",
            r"an override is not YAML\n  where: training\.seed\n  got: while parsing(.*\n)* +\{",
        ),
        ("training.seeed=1", r"unknown config key training\.seeed(.*\n)*.*did you mean seed\?"),
        ("training..seed=1", r"unknown config key training\."),
        ("training.seed=[1, 2]", r"training\.seed breaks(.*\n)*  got: \[1, 2\]\n.*valid integer"),
        ("training.seed=", r"training\.seed breaks(.*\n)*.*valid integer"),
    ],
)
def test_a_wrong_override_is_named(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(str(file), [override])


def test_a_file_that_is_no_config(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match=r"does not exist\n  where: .*config\.yaml\n.*configs/"):
        load_config(str(path))
    path.write_text("data: [1, 2\nrun: }")
    with pytest.raises(
        ConfigError, match=r"is not YAML\n  where: .*config\.yaml\n  got: while(.*\n)*.*line 2"
    ):
        load_config(str(path))
    path.write_text("- data\n- run\n")
    with pytest.raises(ConfigError, match=r"holds no tree of keys\n.*\n  got: list"):
        load_config(str(path))
    path.write_text("")
    with pytest.raises(ConfigError, match=r"holds no tree of keys\n.*\n  got: NoneType"):
        load_config(str(path))
    path.write_bytes(b"\xff\xfe\x80\x81")
    with pytest.raises(ConfigError, match=r"cannot be read\n.*\n  got: UnicodeDecodeError"):
        load_config(str(path))
    with pytest.raises(ConfigError, match=r"cannot be read\n.*\n  got: IsADirectoryError"):
        load_config(str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot be read\n.*\n  got: ValueError.*nowhere"):
        load_config("nowhere://config.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_dumped_config_loads_again(path: Path, tmp_path: Path) -> None:
    config = load_config(str(path), ["training.seed=7", "training.schedule.eta_min=1e-9"])
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config))
    again = load_config(str(dumped))
    assert again == config
    assert dump_config(again) == dump_config(config)


def test_relative_local_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {"data": {"url": "s3://bucket/data"}, "run": {"url": "runs/a"}}
    config = with_absolute_paths(parse_config(merged(changes), where="test"))
    assert config.data.url == "s3://bucket/data"
    assert config.run.url == str(tmp_path / "runs" / "a")
    assert re.match(r"/", config.run.url)
