"""Dockerfile, cluster files and documents: what they name exists, and what they type is understood.

None of these clusters can be started where the tests run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from felrec_dist.config import load_config
from launch.cli import app

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
# Commands in the words of the files


def felrec_commands(text: str) -> list[list[str]]:
    """Every ``felrec ...`` at the beginning of a line, of a comment's or of an entry's."""
    joined = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"^[#\s]*(?:entrypoint: )?(felrec [a-z].*)$", joined, re.MULTILINE)
    commands = [shlex.split(re.sub(r"\s{2,}\(.*|\s&$", "", line), comments=True) for line in found]
    return [command[1:] for command in commands]


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line makes of it, down to the command that would run.

    Raises:
        UsageError: it does not know a word.
    """
    command: Any = get_command(app)
    context = command.make_context("felrec", list(words), resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return {"command": context.info_name, **context.params}


def entrypoint(manifest: Any) -> list[str]:
    return shlex.split(manifest["spec"]["entrypoint"])[1:]


def commands_of(file: str) -> list[list[str]]:
    text = (ROOT / file).read_text()
    if file.endswith("kuberay.yaml"):
        return [entrypoint(yaml.safe_load(text))]
    return felrec_commands(text)


FILES = ("launch/aws.yaml", "launch/kuberay.yaml", "launch/slurm.sh", "docs/cluster.md")


@pytest.mark.parametrize("file", FILES)
def test_every_command_is_understood(file: str) -> None:
    commands = commands_of(file)
    assert commands
    for words in commands:
        facts = parsed(words)
        if facts["command"] in ("train", "submit"):
            path = facts["config"].removeprefix("/app/")
            load_config(str(ROOT / path), facts["overrides"] or [])


def test_a_command_that_is_not_understood_is_noticed() -> None:
    [words] = felrec_commands("  # felrec train configs/demo.yaml \\\n     --locall a=1   (so)\n")
    assert words == ["train", "configs/demo.yaml", "--locall", "a=1"]
    with pytest.raises(Exception, match="No such option: --locall"):
        parsed(words)
    with pytest.raises(Exception, match="No such command 'trian'"):
        parsed(["trian"])


def test_all_files_have_the_same_run() -> None:
    """But for where its files lie."""
    runs = set()
    for file in FILES[:3]:
        [words] = [words for words in commands_of(file) if words[0] in ("train", "submit")]
        facts = parsed(words)
        overrides = [each for each in facts["overrides"] if not re.match(r"(data|run)\.url=", each)]
        runs.add((facts["config"].removeprefix("/app/"), *sorted(overrides)))
    assert len(runs) == 1


# The cluster of Ray's own autoscaler


def load(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text())


def wanted() -> Any:
    [words] = [words for words in commands_of("launch/aws.yaml") if words[0] == "submit"]
    facts = parsed(words)
    return load_config(str(ROOT / facts["config"]), facts["overrides"])


def capacity(nodes: list[tuple[int, dict[str, float]]]) -> list[dict[str, float]]:
    return [resources for count, resources in nodes for _ in range(count)]


def assert_fits(nodes: list[dict[str, float]]) -> None:
    pytest.importorskip("ray")
    from launch.places import for_shards, for_workers, shortage

    config = wanted()
    requests = [for_workers(config.cluster), for_shards(config.cluster, config.cache.num_shards)]
    assert shortage(requests, nodes) == []
    assert shortage(requests, nodes[1:]) != []


def test_the_aws_cluster_is_what_ray_understands_and_large_enough() -> None:
    ray = pytest.importorskip("ray")
    jsonschema = pytest.importorskip("jsonschema")

    cluster = load("aws.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_worker": 1}, schema)
    types = cluster["available_node_types"]
    head = types.pop(cluster["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert sum(each["max_workers"] for each in types.values()) <= cluster["max_workers"]
    # A share of 64 GB is Ray's.
    memory = {"shards": 40e9, "workers": 8e9}
    nodes = [
        (each["max_workers"], {**each["resources"], "memory": memory[name]})
        for name, each in types.items()
    ]
    assert_fits(capacity(nodes))
    [source] = cluster["file_mounts"].values()
    assert (ROOT / source / "launch/install.sh").exists()
    setup = "\n".join(cluster["setup_commands"])
    assert "/launch/install.sh" in setup


# Kubernetes


def test_the_ray_job_has_what_the_operator_needs_and_is_large_enough() -> None:
    job = load("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    assert int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 60
    cluster = spec["rayClusterSpec"]
    pins = (LAUNCH / "constraints.txt").read_text()
    assert f"\nray=={cluster['rayVersion']}\n" in pins
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    groups = cluster["workerGroupSpecs"]
    nodes = []
    for group in [head, *groups]:
        [container] = group["template"]["spec"]["containers"]
        assert not container["image"].endswith(":latest")
        assert ":" in container["image"]
        assert "env" not in container, "secrets come from a Secret"
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"]
        if group is head:
            continue
        assert group["replicas"] == group["minReplicas"] <= group["maxReplicas"]
        resources = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        resources["memory"] = float(limits["memory"].removesuffix("Gi")) * 2**30 * 0.7
        if custom := group["rayStartParams"].get("resources"):
            resources |= json.loads(json.loads(custom.strip("'")))
        nodes.append((group["maxReplicas"], resources))
    assert_fits(capacity(nodes))


# Slurm


def test_the_slurm_script_is_bash_and_large_enough() -> None:
    path = LAUNCH / "slurm.sh"
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert os.access(path, os.X_OK)
    text = path.read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    used = set(re.findall(r"\$\{?(SLURM_\w+)", text))
    assert used <= {
        "SLURM_JOB_NODELIST",
        "SLURM_JOB_NUM_NODES",
        "SLURM_JOB_ID",
        "SLURM_CPUS_PER_TASK",  # of --cpus-per-task
        "SLURM_GPUS_PER_NODE",  # of --gpus-per-node
    }
    assert "set -euo pipefail" in text
    node = {
        "CPU": float(options["cpus-per-task"]),
        "GPU": float(options["gpus-per-node"]),
        "memory": float(options["mem"].removesuffix("G")) * 2**30 * 0.7,
        "cache_node": 1.0,
    }
    assert_fits(capacity([(int(options["nodes"]), node)]))


# The image, and the script that installs it


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]


def test_the_image_is_pinned_and_not_root() -> None:
    steps = instructions()
    [base] = [rest for name, rest in steps if name == "FROM"]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+", base)
    [user] = [rest for name, rest in steps if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "runAsNonRoot looks at a number"
    after = [name for name, _ in steps[steps.index(("USER", user)) + 1 :]]
    assert after == ["HEALTHCHECK", "CMD"]
    named = [rest for name, rest in steps if name in ("ARG", "ENV")]
    assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY", " ".join(named))
    torch = re.search(r"^torch=(\S+)$", (LAUNCH / "install.sh").read_text(), re.MULTILINE)
    assert torch is not None


def test_the_image_copies_all_packages_and_the_context_holds_them() -> None:
    sources = [rest.split()[:-1] for name, rest in instructions() if name == "COPY"]
    copied = {source for each in sources for source in each}
    assert not [source for source in copied if not (ROOT / source).exists()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {package.rstrip("*") for package in packages} <= copied
    context = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    assert {source.split("/")[0] for source in copied} == context


def test_the_image_is_installed_by_the_script_of_the_tests() -> None:
    runs = " ".join(rest for name, rest in instructions() if name == "RUN")
    assert "pip install" not in runs
    assert re.findall(r"launch/install\.sh \S+ (\w+)", runs) == ["torch", "felrec"]
    assert "launch/install.sh $(VENV)" in (ROOT / "Makefile").read_text()


PINNED = "--constraint ROOT/launch/constraints.txt"


@pytest.mark.parametrize(
    ("environment", "step", "installed"),
    [
        ({"TORCH_BUILD": "cpu"}, "torch", ["torch==V+cpu"]),
        ({"TORCH_BUILD": "cuda"}, "torch", ["torch==V"]),
        (
            {"TORCH_BUILD": "cpu"},
            None,
            [
                "torch==V+cpu",
                # TorchRec itself would bring the CUDA build of fbgemm-gpu along.
                f"tensordict pyre-extensions torchmetrics tqdm {PINNED}",
                f"--no-deps torchrec fbgemm-gpu-cpu {PINNED}",
                f"--editable ROOT[ray,s3,report,test] {PINNED}",
            ],
        ),
        (
            {"EXTRAS": "ray,s3", "TORCH_BUILD": "cpu"},
            "felrec",
            [f"--editable ROOT[ray,s3] {PINNED}"],
        ),
        (
            {"TORCH_BUILD": "cuda"},
            "felrec",
            [f"--editable ROOT[ray,s3,torchrec,report,test] {PINNED}"],
        ),
    ],
)
def test_the_script_installs_what_it_is_told(
    tmp_path: Path, environment: dict[str, str], step: str | None, installed: list[str]
) -> None:
    """With a Python that only notes what pip would be told."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    python.chmod(0o755)
    words = ["bash", str(LAUNCH / "install.sh"), str(tmp_path / "venv"), *([step] if step else [])]
    assert subprocess.run(words, env={**os.environ, **environment}, check=False).returncode == 0
    said = (tmp_path / "said").read_text().replace(str(ROOT), "ROOT")
    said = re.sub(r"torch==[\d.]+\d", "torch==V", said)
    prefix = "-m pip --disable-pip-version-check install --quiet "
    assert said.splitlines() == [prefix + each for each in installed]


@pytest.mark.parametrize("words", [["venv", "everything"], []])
def test_the_script_says_how_it_is_used(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to("/bin/true")
    done = subprocess.run(
        ["bash", LAUNCH / "install.sh", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "usage: launch/install.sh VENV" in done.stderr
