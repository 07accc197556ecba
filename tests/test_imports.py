"""Importing does nothing, and one process needs neither Ray nor TorchRec."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import cache_server
import felrec_dist
from tests import tiny

ROOT = Path(felrec_dist.__path__[0]).parent

NEED_RAY = {
    "cache_server.ray_metrics",
    "cache_server.ray_transport",
    "felrec_dist.data.ray_arrange",
    "launch.on_ray",
}
NEED_DUCKDB = {f"felrec_dist.data.{name}" for name in ("arrange", "prepare", "raw_table", "stages")}
NEED_REPORT = {
    "felrec_dist.studies.plots",
    *(f"felrec_dist.reporting.{name}" for name in ("page", "plots", "sections")),
}

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

BLOCKED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Blocker())
"""


def modules_of(package: str, path: list[str]) -> set[str]:
    found = pkgutil.walk_packages(path, f"{package}.")
    return {package, *(module.name for module in found)}


def run_python(code: str, *args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK + code, *args],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


IMPORT_ALL = """
import importlib
import os
import threading

environment = dict(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
import torch.distributed as dist

assert not dist.is_initialized(), "a process group was started"
changed = {k for k in os.environ if os.environ[k] != environment.get(k)} - {"PYTHONPATH"}
assert not {k for k in changed if "FELREC" in k or "RAY" in k}, changed
assert threading.active_count() == 1, threading.enumerate()
loaded = BLOCKED & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
"""


def test_imports_nothing_it_does_not_need_and_says_nothing(tmp_path: Path) -> None:
    modules = modules_of("felrec_dist", list(felrec_dist.__path__))
    modules |= modules_of("cache_server", list(cache_server.__path__))
    modules |= {"launch", "launch.cache_cli", "launch.cli", "launch.compare_cli"}
    modules |= {"launch.local", "launch.progress", "launch.recommend_cli", "launch.report_cli"}
    modules |= {"launch.scale", "launch.scale_cli"}
    assert NEED_DUCKDB | NEED_REPORT < modules, "the exceptions must be real"
    modules -= NEED_RAY | NEED_DUCKDB | NEED_REPORT
    modules -= {name for name in modules if name.startswith("felrec_dist.baselines.")}
    modules.add("felrec_dist.baselines.config")
    blocked = "ray,torchrec,duckdb,matplotlib,sklearn,jinja2"
    done = run_python(IMPORT_ALL, blocked, *sorted(modules), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", sorted(NEED_DUCKDB))
def test_preparation_needs_duckdb_and_no_ray(module: str) -> None:
    done = run_python(IMPORT_ALL, "ray,torchrec", module)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run_python(IMPORT_ALL, "duckdb", module)
    assert "duckdb is blocked" in done.stderr, "the blocker must block"


def test_the_command_line_loads_torch_only_when_it_works() -> None:
    """``felrec --help`` answers at once."""
    done = run_python(
        IMPORT_ALL.partition("import torch")[0] + "assert 'torch' not in sys.modules",
        "ray,torchrec,duckdb",
        "launch.cli",
    )
    assert (done.returncode, done.stderr) == (0, "")


TRAIN = """
from launch.cli import main

main()
"""


def test_a_local_run_needs_no_ray(tmp_path: Path) -> None:
    dataset = tiny.prepare_events(tmp_path)
    from felrec_dist.config import dump_config

    config = tmp_path / "config.yaml"
    config.write_text(dump_config(tiny.experiment(dataset.url, str(tmp_path / "run"))))
    blocked = "ray,torchrec,duckdb"
    done = run_python(TRAIN, blocked, "train", str(config), "--local", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "most popular" in done.stdout
    assert (tmp_path / "run" / "evaluation" / "test-causal.json").exists()
    checkpoint = str(tmp_path / "run" / "checkpoints" / "epoch-0002")
    done = run_python(
        TRAIN, blocked, "evaluate", str(config), "--checkpoint", checkpoint, "--local", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_a_baseline_without_torchrec_says_what_to_install(tmp_path: Path) -> None:
    dataset = tiny.prepare_events(tmp_path)
    urls = (f"data.url={dataset.url}", f"run.url={tmp_path / 'run'}", "data.batch_size=16")
    done = run_python(
        TRAIN, "ray,torchrec", "train", "configs/ml-100k_bpr-mf.yaml", "--local", *urls
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the baselines need TorchRec" in done.stderr
    assert "felrec-dist[torchrec]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_report_without_its_packages_says_what_to_install(tmp_path: Path, package: str) -> None:
    done = run_python(TRAIN, package, "report", str(tmp_path), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert f"{package} is not installed" in done.stderr
    assert "felrec-dist[report]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_on_ray_without_ray_says_what_to_install(tmp_path: Path) -> None:
    dataset = tiny.prepare_events(tmp_path)
    done = run_python(
        "from launch.cli import main; sys.argv[0] = 'felrec'; main()",
        "ray",
        "train",
        "configs/demo.yaml",
        f"data.url={dataset.url}",
        f"run.url={tmp_path / 'run'}",
    )
    assert done.returncode == 1
    assert "ray is not installed" in done.stderr
    assert "felrec-dist[ray]" in done.stderr
    assert "--local" in done.stderr
    assert "Traceback" not in done.stderr
