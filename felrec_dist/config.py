"""One experiment: the tree of all sections, read strictly from YAML and the command line.

Each section stands beside what it configures; this file only composes them.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import fsspec
import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from cache_server import TableSpec
from felrec_dist.baselines.config import (
    BPRMFConfig,
    GRU4RecBPTTConfig,
    GRU4RecConfig,
    JODIEConfig,
    SASRecConfig,
    TablesConfig,
)
from felrec_dist.errors import ConfigError
from felrec_dist.evaluation.evaluator import EvaluationConfig
from felrec_dist.model.felrec import ModelConfig
from felrec_dist.section import Section
from felrec_dist.storage import check_names_one_folder
from felrec_dist.training.checkpoint import CheckpointConfig
from felrec_dist.training.config import TrainingConfig
from felrec_dist.training.representations import CacheConfig


class DataConfig(Section):
    """Which events, in which batches."""

    url: str = Field(description="folder of a prepared data set, any fsspec URL")
    batch_size: int = Field(1024, ge=1, description="B, events of all ranks together")
    train_events: int | None = Field(
        None, ge=1, description="only the last so many of the training part; null for all"
    )


class RunConfig(Section):
    """Where the run lives and what it tells."""

    url: str = Field(description="folder of the run, any fsspec URL")
    log_every_steps: int = Field(50, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("url")
    @classmethod
    def _names_one_folder(cls, url: str) -> str:
        check_names_one_folder(url)
        return url


class ClusterConfig(Section):
    """What a run on Ray asks for; ``felrec train --local`` needs none of it."""

    num_workers: int = Field(1, ge=1, description="W, DDP ranks")
    cpus_per_worker: float = Field(1.0, gt=0.0)
    gpus_per_worker: float = Field(0.0, ge=0.0)
    cpus_per_shard: float = Field(0.0, ge=0.0)
    memory_per_shard_gb: float = Field(
        0.0, ge=0.0, description="reserved on its node, so that shards are placed by memory"
    )
    shard_resources: dict[str, float] = Field(
        default_factory=dict, description="custom resources of each shard, as {cache_node: 1}"
    )
    shard_placement: Literal["spread", "pack"] = Field(
        "spread", description="over as many nodes as there are, or on as few as will do"
    )
    start_timeout_s: float = Field(
        300.0, gt=0.0, description="limit for places to be found, and for processes to come up"
    )
    max_failures: int = Field(
        3, ge=0, description="failures without a new checkpoint in between that a run gets over"
    )
    collective_timeout_s: float = Field(
        1800.0, gt=0.0, description="limit of a rank's wait for the others, a checkpoint included"
    )

    @field_validator("shard_resources")
    @classmethod
    def _are_custom(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ValueError(f"{name} is no custom resource: see the other keys of cluster")
            if amount <= 0.0 or (amount > 1.0 and not amount.is_integer()):
                raise ValueError(f"{name} must be a part of one, or a whole number")
        return resources


AnySection = TypeVar("AnySection", bound=Section)
AnyModel = (
    ModelConfig | BPRMFConfig | SASRecConfig | GRU4RecConfig | GRU4RecBPTTConfig | JODIEConfig
)


class ExperimentConfig(Section):
    """An experiment, whole."""

    data: DataConfig
    run: RunConfig
    model: AnyModel = Field(ModelConfig(), discriminator="variant")
    cache: CacheConfig = CacheConfig()
    tables: TablesConfig = TablesConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _is_felrec_unless_said(cls, model: Any) -> Any:
        is_unsaid = isinstance(model, dict) and "variant" not in model
        return {**model, "variant": "felrec-q"} if is_unsaid else model

    @property
    def felrec(self) -> ModelConfig:
        """The model, where it is known to be FELRec."""
        assert isinstance(self.model, ModelConfig), self.model.variant
        return self.model

    @property
    def model_name(self) -> str:
        """What the model is called in tables, with its ablations."""
        model = self.model
        return model.name if isinstance(model, ModelConfig) else model.variant

    def cache_tables(self) -> dict[str, TableSpec]:
        """Returns the cache's tables: what the model keeps of users and items."""
        return {
            name: TableSpec(width=width, storage=self.cache.storage)
            for name, width in self.model.cache_widths().items()
        }

    @model_validator(mode="after")
    def _heads_are_there(self) -> ExperimentConfig:
        if self.evaluation.use_heads and self.model_name.startswith("felrec-q-NoMLP"):
            raise ValueError("evaluation.use_heads must be false: the model has no heads")
        return self

    @model_validator(mode="after")
    def _baseline_can_do_it(self) -> ExperimentConfig:
        variant = self.model.variant
        if isinstance(self.model, ModelConfig):
            return self
        if not self.model.serves_new_items and self.evaluation.candidates != "training":
            raise ValueError(
                f"evaluation.candidates must be training: {variant} has no vectors of new items"
            )
        if self.data.train_events is not None:
            raise ValueError(f"data.train_events must be null: {variant} trains on all events")
        if self.evaluation.protocol != "causal":
            raise ValueError(f"evaluation.protocol must be causal: {variant} has no other")
        evaluation = self.evaluation
        if evaluation.cache != "validated" or evaluation.use_heads or evaluation.nearest_users:
            raise ValueError(
                "evaluation.cache, use_heads and nearest_users must be left alone: "
                f"they are for FELRec, not for {variant}"
            )
        if variant == "jodie" and self.cache.storage not in ("float32", "float64"):
            raise ValueError("cache.storage must be float32: jodie keeps times in its rows")
        if self.training.dtype != "float32" or self.training.autocast != "off":
            raise ValueError(
                "training.dtype must be float32 and training.autocast off: "
                f"the tables of {variant} are float32"
            )
        return self

    @model_validator(mode="after")
    def _slices_are_equal(self) -> ExperimentConfig:
        if self.data.batch_size % self.cluster.num_workers:
            raise ValueError(
                f"data.batch_size = {self.data.batch_size} must be a multiple of "
                f"cluster.num_workers = {self.cluster.num_workers}"
            )
        if self.data.batch_size < 2:
            raise ValueError("data.batch_size must be 2 or more: BatchNorm has no variance of one")
        return self


def load_config(url: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads a YAML file and lays ``key=value`` overrides over it.

    Args:
        url: the file, any fsspec URL.
        overrides: as ``training.schedule.base_lr=0.05``; values are YAML.

    Raises:
        ConfigError: the file is missing, unreadable or no YAML, a key is unknown, a value breaks a
            rule.
    """
    return parse_config(read_tree(url, overrides), where=url)


def read_tree(url: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the tree of a YAML file with ``key=value`` overrides laid over it, unchecked.

    Raises:
        ConfigError: the file is missing, unreadable or holds no tree.
    """
    try:
        with fsspec.open(url, "r") as file:
            text = file.read()
    except FileNotFoundError as error:
        raise ConfigError(
            "the config file does not exist", where=url, remedy="see configs/ for examples"
        ) from error
    # A folder, no right to read, bytes that are no text; and each storage has errors of its own.
    except Exception as error:
        raise ConfigError(
            "the config file cannot be read",
            where=url,
            got=f"{type(error).__name__}: {error}",
            expected="a text file, any fsspec URL",
            remedy="check the address, the rights and the connection",
        ) from error
    tree = _parse(text, "the config file is not YAML", where=url)
    if not isinstance(tree, dict):
        raise ConfigError(
            "the config file holds no tree of keys",
            where=url,
            got=type(tree).__name__,
            expected="sections such as data:, run:, model:",
        )
    for override in overrides:
        _override(tree, override)
    return tree


def parse_config(tree: Mapping[str, Any], *, where: str) -> ExperimentConfig:
    """Checks a tree of plain values.

    Raises:
        ConfigError: with the field, the value and the rule of the first thing that is wrong.
    """
    return parse_section(ExperimentConfig, tree, where=where)


def parse_section(kind: type[AnySection], tree: Mapping[str, Any], *, where: str) -> AnySection:
    """Checks a tree against any section that is a file of its own.

    Raises:
        ConfigError: as ``parse_config``.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, kind, where) from error


def with_absolute_paths(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the config with relative local paths made absolute: workers run in other folders."""
    cache = config.cache
    if cache.spill_dir is not None:
        cache = cache.model_copy(update={"spill_dir": os.path.abspath(cache.spill_dir)})
    return config.model_copy(
        update={
            "cache": cache,
            "data": config.data.model_copy(update={"url": absolute_url(config.data.url)}),
            "run": config.run.model_copy(update={"url": absolute_url(config.run.url)}),
        }
    )


def absolute_url(url: str) -> str:
    """Returns a relative local path made absolute, and any other URL as it is."""
    return url if "://" in url or "::" in url else os.path.abspath(url)


def dump_config(config: ExperimentConfig) -> str:
    """Returns the merged config as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _parse(text: str, what: str, *, where: str) -> Any:
    """Returns what a YAML text says."""
    try:
        return yaml.load(text, _Loader)
    # Beside YAML's own errors: numbers of too many digits, dates that do not exist, a depth that
    # Python's stack has no room for.
    except Exception as error:
        raise ConfigError(
            what,
            where=where,
            got=error if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: {error}",
            remedy="see configs/ for examples; a value with special characters needs quotes",
        ) from error


def _override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(
            "an override has no value",
            where="command line",
            got=override,
            expected="key=value, as training.seed=1",
        )
    put(tree, path, _parse(text, "an override is not YAML", where=path))


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets the value of a dotted key in a tree.

    Raises:
        ConfigError: a part of the path is no section.
    """
    *parents, last = path.split(".")
    for key in parents:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(
                "an override goes through a value",
                where=path,
                got=f"{key} = {_in_short(child)}",
                expected=f"a section of the name {key}",
            )
        tree = child
    tree[last] = value


def _explain(error: ValidationError, root: type[BaseModel], where: str) -> ConfigError:
    details = error.errors()[0]
    location, section = _place(root, details["loc"])
    path = ".".join(str(part) for part in location)
    if details["type"] == "extra_forbidden":
        known = list(section.model_fields)
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1)
        return ConfigError(
            f"unknown config key {path}",
            where=where,
            expected=f"one of {', '.join(known)}",
            remedy=f"did you mean {nearest[0]}?" if nearest else "",
        )
    if details["type"] == "missing":
        return ConfigError(f"config key {path} is missing", where=where, remedy=f"set {path}=...")
    return ConfigError(
        f"config value {path or '(whole tree)'} breaks a rule",
        where=where,
        got=_in_short(details["input"]) if path else None,
        expected=details["msg"],
    )


def _place(
    section: type[BaseModel], location: Sequence[int | str]
) -> tuple[list[int | str], type[BaseModel]]:
    """Returns the path of a key as it stands in the file, and the innermost section around it."""
    path: list[int | str] = []
    choices: dict[str, type[BaseModel]] = {}
    for part in location:
        if part in choices:  # pydantic names the choice it has made, as one more key
            section, choices = choices[str(part)], {}
            continue
        path.append(part)
        field = section.model_fields.get(str(part))
        if field is None:
            continue
        if field.discriminator:
            choices = {
                str(variant): choice
                for choice in get_args(field.annotation)
                for variant in get_args(choice.model_fields[field.discriminator].annotation)
            }
        else:
            # A section, or a dictionary or a tuple of them.
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    section = kind
    return path, section


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 200


def _in_short(value: object) -> str:
    """Returns a value as Python writes it, of whatever size it is: a few aliases of aliases make
    millions of items out of ten.
    """
    try:
        return _SHORT.repr(value)
    except ValueError as error:  # Python does not write numbers of thousands of digits
        return f"{type(value).__name__}: {error}"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-7 for a string; everybody means the number. And of two equal keys it takes
    the last one; nobody means that.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = (key.tag, key.value)
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands there twice", key.start_mark
                    )
                seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
