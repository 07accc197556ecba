"""The reference trajectories: float64 runs of the authors' code (``FELREC_GOLDEN``)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from felrec_dist.config import ExperimentConfig, parse_config

FOLDER = Path(os.environ.get("FELREC_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


@dataclass(frozen=True)
class Trajectory:
    """One recorded run: its hyper-parameters, its events and everything it computed."""

    name: str
    settings: dict[str, Any]
    events_path: Path
    arrays: dict[str, npt.NDArray[Any]]

    @classmethod
    def read(cls, path: Path) -> Trajectory:
        with np.load(path.with_suffix(".npz")) as file:
            arrays = {name: file[name] for name in file}
        return cls(path.stem, json.loads(path.read_text()), path.with_suffix(".parquet"), arrays)

    def config(
        self,
        data_url: str,
        run_url: str,
        *,
        num_workers: int = 1,
        num_shards: int = 1,
        hot_rows: int = 1_000_000,
    ) -> ExperimentConfig:
        """The experiment that must give this trajectory, however it is cut."""
        s = self.settings
        # The queue of a P run and the clipping of a run without it do not matter.
        assert s["weight_decay"] == 0.0
        return parse_config(
            {
                "data": {"url": data_url, "batch_size": s["batch_size"]},
                "run": {"url": run_url, "log_every_steps": 10, "device": "cpu"},
                "model": {
                    "variant": s["variant"],
                    "encoder": {
                        "history_length": s["history_length"],
                        "width": s["d_model"],
                        "feedforward_width": s["d_ff"],
                        "num_layers": s["layers"],
                        "num_heads": s["heads"],
                        "dropout": s["dropout"],
                    },
                    "queue_size": s["queue_size"] or 1,
                    "temperature": s["temperature"] or 0.07,
                },
                "cache": {
                    "num_shards": num_shards,
                    "storage": "float64",
                    "block_rows": 128,
                    "hot_rows": hot_rows,
                },
                "training": {
                    "schedule": {
                        "kind": "released",
                        "base_lr": s["base_lr"],
                        "eta_min": s["eta_min"],
                        "epochs": s["epochs"],
                        "warmup_epochs": s["warmup_epochs"],
                    },
                    "momentum": s["momentum"],
                    "grad_clip_value": s["grad_clip_value"],
                    "dtype": s["dtype"],
                },
                "cluster": {"num_workers": num_workers},
            },
            where=self.name,
        )

    def parameters(self, stage: str) -> dict[str, torch.Tensor]:
        """The model's state at ``init`` or ``final`` under our names."""
        prefix = f"{stage}/"
        return {
            _our_name(name.removeprefix(prefix)): torch.from_numpy(array)
            for name, array in self.arrays.items()
            if name.startswith(prefix) and not name.endswith("_cache")
        }


def _our_name(name: str) -> str:
    """``encoder/layer0/attention/query`` -> ``encoder.blocks.0.attention.query.weight``."""
    if name.endswith("_queue"):
        return f"{name}.entries_KD"
    parts = name.split("/")
    if parts[0] == "encoder" and parts[1].startswith("layer"):
        block = ["encoder", "blocks", parts[1].removeprefix("layer")]
        rest = parts[2:]
        if rest[0] == "attention":
            rest = [*rest, "weight"]
        if rest[0] == "feedforward":
            rest = [f"feedforward_{rest[1]}", *rest[2:]]
        parts = block + rest
    return ".".join(parts)


def read_all() -> list[Trajectory]:
    """Every trajectory in the folder; empty where there is none."""
    return [Trajectory.read(path) for path in sorted(FOLDER.glob("*.json"))]
