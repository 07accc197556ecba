"""A study: one experiment, grids of settings around it, and layouts to predict, read from YAML.

A cell is one point of a grid: a whole run with a folder of its own. Grids may share cells; each is
run once.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pydantic import Field, field_validator, model_validator

from felrec_dist.config import ExperimentConfig, parse_config, parse_section, put, read_tree
from felrec_dist.errors import ConfigError
from felrec_dist.model.felrec import ModelConfig
from felrec_dist.section import Section
from felrec_dist.storage import check_names_one_folder, json_sha256
from felrec_dist.studies.cost import Constants

Setting = str | int | float | bool | None
SYNTHETIC = "synthetic"
_CONSTANTS = tuple(field.name for field in fields(Constants))


class SyntheticSection(Section):
    """Events that are generated and prepared once for all cells that want them."""

    num_events: int = Field(1_000_000, ge=100)
    events_per_user: int = Field(50, ge=1, description="so users grow with the events")
    events_per_item: int = Field(250, ge=1)
    validation_events: int = Field(10_000, ge=1, description="whatever the number of events")
    test_events: int = Field(1_000, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _some_are_left(self) -> SyntheticSection:
        if self.num_events <= self.validation_events + self.test_events:
            raise ValueError(
                f"num_events = {self.num_events} must be above validation_events + test_events"
            )
        return self

    @property
    def name(self) -> str:
        """Of its folder: other settings, another folder."""
        return f"{self.num_events}-{json_sha256(self.model_dump())[:8]}"


class HardwareSection(Section):
    """Nodes to predict for."""

    name: str = Field(description="as it stands in the report")
    workers_per_node: int = Field(1, ge=1)
    cores_per_node: int = Field(1, ge=1)
    memory_per_node_gb: float = Field(gt=0.0, description="that shards may take")
    assumed: dict[str, float] = Field(
        default_factory=dict,
        description="constants of the cost model that this machine cannot measure",
    )

    @field_validator("assumed")
    @classmethod
    def _are_constants(cls, assumed: dict[str, float]) -> dict[str, float]:
        for name, value in assumed.items():
            if name not in _CONSTANTS:
                raise ValueError(f"{name} is none of {', '.join(_CONSTANTS)}")
            if value < 0.0:
                raise ValueError(f"{name} must not be negative")
        return assumed


class PredictionSection(Section):
    """What the cost model is asked for: all workers by all sizes of the cache."""

    hardware: HardwareSection
    workers: list[int] = Field([1, 2, 4, 8, 16, 32, 64], min_length=1)
    events_per_worker: int = Field(1024, ge=2, description="of a batch: B = W times this")
    cache_rows: list[int] = Field([10**6, 10**8, 10**9, 10**10], min_length=1)
    shards_per_node: int = Field(2, ge=1)
    hot_rows: int = Field(1_000_000, ge=0)


class StudyConfig(Section):
    """A study, whole."""

    out: str = Field(description="folder of the study, any fsspec URL")
    config: str = Field(description="the experiment that all cells share: a YAML file")
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="of all cells: dotted keys of the experiment"
    )
    synthetic: SyntheticSection | None = Field(
        None, description="the events; null takes data.url of the experiment"
    )
    grids: dict[str, dict[str, list[Setting]]] = Field(
        min_length=1, description="by name: dotted keys and their values, of which all are combined"
    )
    warmup_steps: int = Field(20, ge=0, description="of each cell, not measured")
    predictions: list[PredictionSection] = Field(default_factory=list)

    @field_validator("out")
    @classmethod
    def _names_one_folder(cls, url: str) -> str:
        check_names_one_folder(url)
        return url.rstrip("/")

    @field_validator("grids")
    @classmethod
    def _have_values(
        cls, grids: dict[str, dict[str, list[Setting]]]
    ) -> dict[str, dict[str, list[Setting]]]:
        for name, grid in grids.items():
            for key, values in grid.items():
                if not values:
                    raise ValueError(f"{key} of grid {name} has no values")
        return grids

    @model_validator(mode="after")
    def _synthetic_is_there(self) -> StudyConfig:
        keys = [key for grid in self.grids.values() for key in grid]
        if self.synthetic is None and any(key.startswith(f"{SYNTHETIC}.") for key in keys):
            raise ValueError("synthetic must be there: a grid changes it")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: the settings in which it differs from the experiment; of its folder.
        settings: its values of all settings that any grid changes, by dotted key.
        config: of the run; ``run.url`` is its folder.
        synthetic: its events; None where they are there already.
    """

    name: str
    settings: Mapping[str, Setting]
    config: ExperimentConfig
    synthetic: SyntheticSection | None

    @property
    def facts(self) -> dict[str, Any]:
        """What a finished cell is recognised by, whatever its study's folder is called now."""
        config = self.config.model_dump(mode="json")
        del config["run"]["url"]
        if self.synthetic is not None:
            del config["data"]["url"]
        return {"config": config, "synthetic": self.synthetic and self.synthetic.model_dump()}


def load_study(url: str, overrides: Sequence[str] = ()) -> tuple[StudyConfig, list[Cell]]:
    """Reads a study; every cell's config is checked before the first one runs.

    Args:
        url: a YAML file, any fsspec URL.
        overrides: ``key=value`` of the study, as ``out=runs/again``.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, a value breaks a rule; naming the
            cell.
    """
    study = parse_section(StudyConfig, read_tree(url, overrides), where=url)
    base = read_tree(study.config)
    for key, value in study.overrides.items():
        put(base, key, value)
    return study, list(_cells(study, base, where=url))


def _cells(study: StudyConfig, base: dict[str, Any], *, where: str) -> Iterator[Cell]:
    keys = list(dict.fromkeys(key for grid in study.grids.values() for key in grid))
    unchanged = _cell(study, base, {}, keys, {}, where=f"{where}, without its grids")
    names: set[str] = set()
    for grid_name, grid in study.grids.items():
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            place = f"{where}, grid {grid_name}: {_words(chosen, keys) or 'as it is'}"
            cell = _cell(study, base, chosen, keys, unchanged.settings, where=place)
            if cell.name not in names:
                names.add(cell.name)
                yield cell


def _cell(
    study: StudyConfig,
    base: dict[str, Any],
    chosen: Mapping[str, Setting],
    keys: Sequence[str],
    unchanged: Mapping[str, Setting],
    *,
    where: str,
) -> Cell:
    tree = copy.deepcopy(base)
    events: dict[str, Any] = {} if study.synthetic is None else study.synthetic.model_dump()
    for key, value in chosen.items():
        section, _, name = key.partition(".")
        if section == SYNTHETIC:
            events[name] = value
        else:
            put(tree, key, value)
    synthetic = parse_section(SyntheticSection, events, where=where) if study.synthetic else None
    if synthetic is not None:
        put(tree, "data.url", f"{study.out}/data/{synthetic.name}/prepared")
    put(tree, "run.url", f"{study.out}/cells/none")
    config = parse_config(tree, where=where)
    if not isinstance(config.model, ModelConfig):
        raise ConfigError(
            "a study is of FELRec",
            where=where,
            got=f"model.variant {config.model.variant}",
            expected="felrec-q or felrec-p: others move no rows at a step",
        )
    effective = {**config.model_dump(), SYNTHETIC: events}
    settings = {key: _value(effective, key, where) for key in keys}
    differing = {key: value for key, value in settings.items() if value != unchanged.get(key)}
    # It is a folder, on any storage.
    name = re.sub(r"[^\w.=,+-]", "_", _words(differing, keys)) or "base"
    run = config.run.model_copy(update={"url": f"{study.out}/cells/{name}"})
    return Cell(name, settings, config.model_copy(update={"run": run}), synthetic)


def _value(tree: Mapping[str, Any], key: str, where: str) -> Setting:
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping | list):
        raise ConfigError(
            "a grid sets a section, not a value",
            where=where,
            got=key,
            expected="a dotted key of one value, as data.batch_size",
        )
    return value


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Returns the last part of each dotted key, or all of it where two end alike."""
    ends = Counter(key.rpartition(".")[2] for key in keys)
    return {
        key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in dict.fromkeys(keys)
    }


def _words(settings: Mapping[str, Setting], keys: Sequence[str]) -> str:
    names = short_names(keys)
    return ",".join(f"{names[key]}={value}" for key, value in settings.items())
