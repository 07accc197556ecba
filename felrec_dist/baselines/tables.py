"""Trained vectors of users and items, sharded over the ranks by TorchRec.

A table is an ``EmbeddingCollection`` under ``DistributedModelParallel``, cut into equal ranges of
rows: a table that is too large for one rank trains on several. TorchRec averages gradients over the
ranks, as DDP does for the dense part.

TorchRec updates a table inside the backward pass, and only by rules that know nothing of the rows
without a gradient (on a CPU: SGD and Adagrad). For ``update = exact`` the gradient is wanted
itself: a second collection of zeros is read beside the vectors and subtracted from them; what SGD
of rate 1 leaves in it is the gradient of this rank's rows, summed over all ranks. Any optimizer of
torch then takes it, with clipping, momentum and weight decay as for one dense parameter.

Shape legend: M distinct ids, V rows of a table, R of them on this rank, D width, W ranks.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch does not list it

from felrec_dist.baselines.config import TablesConfig
from felrec_dist.errors import ConfigError
from felrec_dist.training.checkpoint import (
    Checkpoint,
    TablePart,
    read_table_part,
    write_table_part,
)
from felrec_dist.training.world import World

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what these libraries use
        from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
        from torchrec.distributed import DistributedModelParallel
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
        from torchrec.distributed.types import ShardingPlan
        from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
        from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
except ImportError as error:
    raise ConfigError(
        "the baselines need TorchRec",
        where="model.variant",
        got=error,
        remedy="run launch/install.sh, or pip install 'felrec-dist[torchrec]' on a CUDA machine",
    ) from error

# Rows that are drawn together: what a row begins with does not depend on where it lies.
_CHUNK_ROWS = 4096


class ShardedTables:
    """Tables of width D; each rank holds the rows of one range of each."""

    def __init__(
        self,
        num_rows: Mapping[str, int],
        width: int,
        config: TablesConfig,
        world: World,
        *,
        seed: int,
        base_lr: float,
    ) -> None:
        """Draws the initial vectors; they are the same for any number of ranks.

        Args:
            num_rows: V, by name of the table.
            width: D.
            config: how they are updated.
            world: of the run.
            seed: of the initial vectors.
            base_lr: the learning rate at which ``fused_lr`` holds.
        """
        self.width = width
        self.world = world
        self.num_rows = dict(num_rows)
        self._is_exact = config.update == "exact"
        self._fused_share = config.fused_lr / base_lr
        self._made_group = not dist.is_initialized()
        if self._made_group:  # TorchRec knows no run without one
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        if self._is_exact:
            self._vectors = self._sharded(torch.optim.SGD, 0.0)
            self._gradients = self._sharded(torch.optim.SGD, 1.0)
            shards = _local_rows(self._gradients)
        elif config.fused_optimizer == "sgd":
            self._vectors = self._sharded(torch.optim.SGD, config.fused_lr)
        else:
            self._vectors = self._sharded(RowWiseAdagrad, config.fused_lr)
        self.first_rows: dict[str, int] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        local = _local_rows(self._vectors)
        for number, name in enumerate(self.num_rows):
            first, rows_RD = local[name]
            self.first_rows[name] = first
            self.parameters[name] = nn.Parameter(rows_RD)
            _draw(rows_RD, first, seed=seed, table=number, std=config.initial_std)
            if self._is_exact:
                self.parameters[name].grad = shards[name][1]

    @property
    def num_parameters(self) -> int:
        """Of all ranks."""
        return self.width * sum(self.num_rows.values())

    def lookup(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the vectors of rows, each shape with D behind it; every rank calls it.

        In training the gradient goes back to the tables; under ``no_grad`` nothing does.

        Args:
            ids: rows of each table, int64 of any shape, each of them within the table.
        """
        distinct, inverse = {}, {}
        for name in self.num_rows:
            distinct[name], inverse[name] = ids[name].unique(return_inverse=True)
        features = KeyedJaggedTensor(
            keys=list(distinct),
            values=torch.cat(list(distinct.values())),
            lengths=torch.tensor([len(d) for d in distinct.values()], device=self.world.device),
        )
        rows = _read(self._vectors, features, needs_gradient=not self._is_exact)
        if self._is_exact and torch.is_grad_enabled():
            zeros = _read(self._gradients, features, needs_gradient=True)
            rows = {name: rows[name] - zeros[name] for name in rows}
        return {name: rows[name][inverse[name]] for name in rows}

    def prepare(self, learning_rate: float) -> None:
        """Makes the tables ready for a backward pass at this learning rate."""
        if self._is_exact:
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                parameter.grad.zero_()
        else:
            for group in self._vectors.fused_optimizer.param_groups:
                group["lr"] = self._fused_share * learning_rate
            # Only this hands the rate to the kernel; there is no gradient to clear.
            self._vectors.fused_optimizer.zero_grad()

    @property
    def optimized(self) -> dict[str, nn.Parameter]:
        """The parameters (R, D) that the run's optimizer has to update, by table."""
        return self.parameters if self._is_exact else {}

    def write(self, url: str, states: Mapping[str, Tensor]) -> list[TablePart]:
        """Writes this rank's rows into a checkpoint's folder; returns the parts of all ranks.

        Args:
            url: the folder.
            states: of the optimizer, as ``<table>:<name>``.
        """
        states = {**states, **self.fused_states}
        part = write_table_part(
            url, self.world.rank, {**self.parameters, **states}, self.first_rows
        )
        parts: list[Any] = [None] * self.world.world_size
        dist.all_gather_object(parts, part)
        return parts

    def load(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Takes this rank's rows from a checkpoint of any number of ranks.

        Returns:
            The optimizer's states, as given to ``write``; a tensor without rows as one rank had it.

        Raises:
            CheckpointError: a part is missing or damaged.
            KeyError, ValueError: the tables are others.
        """
        states: dict[str, Tensor] = {}
        targets = {**self.parameters, **self.fused_states}
        num_taken = dict.fromkeys(self.parameters, 0)
        for part in checkpoint.tables:
            rows = read_table_part(checkpoint.url, part)
            for name, source in rows.items():
                table = name.partition(":")[0]
                if source.ndim == 0:
                    states[name] = source
                    continue
                parameter = self.parameters[table]
                if name not in targets:
                    shape = (len(parameter), *source.shape[1:])
                    targets[name] = states[name] = parameter.new_zeros(shape)
                first, mine = part.first_rows[table], self.first_rows[table]
                start = max(first, mine)
                stop = min(first + len(source), mine + len(parameter), self.num_rows[table])
                if start >= stop:
                    continue
                with torch.no_grad():
                    targets[name][start - mine : stop - mine] = source[start - first : stop - first]
                if name == table:
                    num_taken[table] += stop - start
        for table, taken in num_taken.items():
            stop = min(self.first_rows[table] + len(self.parameters[table]), self.num_rows[table])
            if taken != max(0, stop - self.first_rows[table]):
                raise ValueError(f"table {table}: {taken} rows of this rank's {stop}")
        return states

    def close(self) -> None:
        """Ends the process group of a run on one process, if it was made here."""
        if self._made_group:
            dist.destroy_process_group()

    def _sharded(self, optimizer: type[torch.optim.Optimizer], lr: float) -> Any:
        """Returns the tables as a sharded module of zeros, updated by ``optimizer``."""
        world_size = self.world.world_size
        # It warns of itself, on every rank.
        logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            collection = EmbeddingCollection(
                tables=[
                    EmbeddingConfig(
                        name=name,
                        embedding_dim=self.width,
                        # TorchRec has no empty shards.
                        num_embeddings=-(-rows // world_size) * world_size,
                        feature_names=[name],
                        init_fn=torch.nn.init.zeros_,
                    )
                    for name, rows in self.num_rows.items()
                ],
                device=torch.device("meta"),
            )
            apply_optimizer_in_backward(optimizer, collection.parameters(), {"lr": lr})
            sharder = EmbeddingCollectionSharder()
            plan = construct_module_sharding_plan(
                collection,
                {name: row_wise(compute_kernel="fused") for name in self.num_rows},
                sharder=sharder,
                local_size=world_size,
                world_size=world_size,
                device_type=self.world.device.type,
            )
            return DistributedModelParallel(
                collection,
                device=self.world.device,
                plan=ShardingPlan({"": plan}),
                sharders=[sharder],
                init_data_parallel=False,
            )

    @property
    def fused_states(self) -> dict[str, Tensor]:
        """The states of the fused optimizer that have a row for each of this rank's."""
        if self._is_exact:
            return {}
        states = {}
        for key, by_name in self._vectors.fused_optimizer.state_dict()["state"].items():
            table = key.split(".")[1]
            for name, value in by_name.items():
                shards = value.local_shards() if hasattr(value, "local_shards") else []
                if shards:
                    states[f"{table}:{name.rpartition('.')[2]}"] = shards[0].tensor
        return states


def _read(module: Any, features: Any, *, needs_gradient: bool) -> dict[str, Tensor]:
    """Returns (M, D) of each table."""
    with (
        warnings.catch_warnings(),
        torch.set_grad_enabled(needs_gradient and torch.is_grad_enabled()),
    ):
        warnings.simplefilter("ignore")
        return {name: jagged.values() for name, jagged in module(features).items()}


def _local_rows(module: Any) -> dict[str, tuple[int, Tensor]]:
    """Returns this rank's rows of each table, and which of the table's is the first of them."""
    local = {}
    for key, sharded in module.state_dict().items():
        (shard,) = sharded.local_shards()
        local[key.split(".")[1]] = (int(shard.metadata.shard_offsets[0]), shard.tensor)
    return local


def _draw(rows_RD: Tensor, first: int, *, seed: int, table: int, std: float) -> None:
    """Fills rows from ``first`` on with normal numbers that depend on seed, table and row only."""
    stop = first + len(rows_RD)
    for chunk in range(first // _CHUNK_ROWS, -(-stop // _CHUNK_ROWS)):
        generator = torch.Generator().manual_seed(
            (seed * 1_000_003 + table) * 1_000_003 + chunk & (2**63 - 1)
        )
        drawn = torch.randn(_CHUNK_ROWS, rows_RD.shape[1], generator=generator) * std
        start, end = max(first, chunk * _CHUNK_ROWS), min(stop, (chunk + 1) * _CHUNK_ROWS)
        offset = start - chunk * _CHUNK_ROWS
        rows_RD[start - first : end - first] = drawn[offset : offset + end - start]
