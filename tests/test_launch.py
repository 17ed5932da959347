"""What starts distdiff on clusters, as far as that can be tried without one."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "launch" / "slurm"
SCRIPTS = sorted(path for path in SLURM.iterdir() if path.suffix in (".sbatch", ".sh"))
PROGRAMS = "sbatch|distdiff|python launch/\\S+|accelerate launch|mlflow server"
RECIPES = sorted(SLURM.glob("*_dask.py"))
MANIFESTS = sorted((ROOT / "launch" / "kubernetes").glob("*.yaml"))


def documents(path):
    return list(yaml.safe_load_all(path.read_text()))


def pods(tree):
    """Every pod's spec of a manifest, whatever it stands in."""
    if isinstance(tree, dict):
        if "containers" in tree:
            yield tree
        for value in tree.values():
            yield from pods(value)


def commands():
    """``(where, words)`` of every command that the launch files, the README and docs/ show, or run."""
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *SCRIPTS, *MANIFESTS, *RECIPES]
    for path in texts:
        text = path.read_text().replace("\\\n", " ")
        if path.suffix == ".md":  # of pages their shell blocks
            text = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
        for line in re.findall(rf"^[# ]*((?:{PROGRAMS}) .*)$", text, re.MULTILINE):
            yield path.name, shlex.split(line, comments=True)
    for path in MANIFESTS:
        for pod in (pod for tree in documents(path) for pod in pods(tree)):
            for part in pod["containers"]:
                words = [*part.get("command", []), *part.get("args", [])]
                if words[:2] == ["bash", "-c"]:
                    words = shlex.split(words[2].removeprefix("exec "))
                yield path.name, words


def parse(words):
    """Let the command line parse, and not run, what ``distdiff`` is given."""
    import typer

    from distdiff.cli import app

    command, words = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


def of_distdiff(words):
    """The words for ``distdiff`` in a command, if it has any."""
    if words[0] == "distdiff":
        return words[1:]
    for script, task in (("launch/train.py", "train"), ("train.sbatch", "train"), ("launch/impute.py", "impute")):
        for place, word in enumerate(words):
            if word.endswith(script):
                return [task, *words[place + 1 :]]
    if words[1:] and words[1].endswith("_dask.py"):
        options = runpy.run_path(str(SLURM / "workers.py"))["options"]
        return [Path(words[1]).name.removesuffix("_dask.py"), *options(None).parse_known_args(words[2:])[1]]
    return []


def test_every_command_has_flags_that_exist():
    from accelerate.commands.launch import launch_command_parser

    found = [(where, words, of_distdiff(words)) for where, words in commands()]
    for where, words, ours in found:
        if words[:2] == ["accelerate", "launch"]:
            numbers = [re.sub(r"^\$.*", "1", word) for word in words[2:]]
            launch_command_parser().parse_args(numbers)
            if "--config_file" in words:
                engine = words[words.index("--config_file") + 1]
                assert engine == "$ACCELERATE_CONFIG" or (ROOT / engine).exists()
        if ours and "$@" not in ours:
            try:
                parse(ours)
            except Exception as error:
                pytest.fail(f"{where}: {shlex.join(words)}: {error}")
    seen = {(where, ours[0]) for where, _, ours in found if ours}
    assert seen >= {
        ("train.sbatch", "train"), ("shard_dask.py", "shard"), ("impute_dask.py", "impute"),
        ("train-pytorchjob.yaml", "train"), ("impute-job.yaml", "impute"), ("dask-cluster.yaml", "shard"),
        ("mlflow.md", "mlflow"),
    }  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [p for p in SCRIPTS if p.suffix == ".sbatch"], ids=lambda p: p.name)
def test_directives_stand_where_slurm_reads_them(path):
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", word) for word in directives)
    assert "--requeue" in directives
    if path.name == "train.sbatch":
        assert {"--signal=B:USR1@180", "--ntasks-per-node=1"} <= set(directives)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_manifests_name_what_there_is(path):
    claims = {tree["metadata"]["name"] for tree in documents(ROOT / "launch" / "kubernetes" / "volume.yaml")}
    clusters = {tree["metadata"]["name"] for p in MANIFESTS for tree in documents(p) if tree["kind"] == "DaskCluster"}
    for tree in documents(path):
        assert {"apiVersion", "kind", "metadata", "spec"} <= tree.keys()
        for pod in pods(tree):
            volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
            for volume in volumes.values():
                assert volume.get("persistentVolumeClaim", {}).get("claimName", "distdiff-shared") in claims
            for part in pod["containers"]:
                assert part["image"] == "distdiff:latest"
                assert {mount["name"] for mount in part.get("volumeMounts", [])} <= volumes.keys()
                for host in re.findall(r"tcp://(\S+)-scheduler:8786", " ".join(map(str, part.get("args", [])))):
                    assert host in clusters
    if path.name == "train-pytorchjob.yaml":
        (tree,) = documents(path)
        replicas = tree["spec"]["pytorchReplicaSpecs"]
        assert {name: part["replicas"] for name, part in replicas.items()} == {"Master": 1, "Worker": 3}
        assert all(part["template"]["spec"]["containers"][0]["name"] == "pytorch" for part in replicas.values())


# -- a job on a cluster that is not there --------------------------------------------------------------------------

SRUN = """#!/bin/bash
# starts the one node of the job in a session of its own; USR1 reaches its first process, or all
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 setsid "$@" &
node=$!
case $DELIVERY in leader) to=$node ;; all) to=-$node ;; esac
trap 'kill -USR1 -- $to' USR1
while kill -0 $node 2>/dev/null; do wait $node; status=$?; done
exit $status
"""

SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf '%s\\n' node7 node8; else echo "$@" >> "$WORK/scontrol"; fi
"""

ACCELERATE = """#!{python}
# a launcher as accelerate's: it starts the processes, has no handler for USR1, and loses their exit status
import subprocess, sys, os
open(os.environ["WORK"] + "/launched", "w").write(" ".join(sys.argv[1:]))
worker = subprocess.run([sys.executable, os.environ["WORK"] + "/worker.py"])
open(os.environ["WORK"] + "/survived", "w").write(str(worker.returncode))
sys.exit(1 if worker.returncode else 0)
"""

WORKER = """
import os, pathlib, signal, sys, time
work, before = pathlib.Path(os.environ["WORK"]), None
def save(number, frame):
    signal.signal(number, before)  # the second signal does what it always did
    with (work / "saved").open("a") as file:
        file.write("saved\\n")
if "SLURM_JOB_END_TIME" in os.environ:
    sys.exit(75)  # it leaves by itself before the end, and nobody queues the job again
if os.environ["ROLE"] != "deaf":
    before = signal.signal(signal.SIGUSR1, save)
(work / "ready").touch()
end = time.monotonic() + 60
while time.monotonic() < end and os.environ["ROLE"] in ("good", "deaf"):
    if (work / "saved").exists():
        time.sleep(0.5)
        sys.exit(75)
    time.sleep(0.05)
sys.exit({"done": 0, "broken": 3}.get(os.environ["ROLE"], 9))
"""


class Job:
    """train.sbatch as a batch job of a made cluster; ``DELIVERY``: whom srun hands signals."""

    def __init__(self, work, role, delivery="all", script="train.sbatch", **more):
        self.work = work
        tools = {"srun": SRUN, "scontrol": SCONTROL, "accelerate": ACCELERATE.format(python=sys.executable)}
        (work / "bin").mkdir()
        (work / "worker.py").write_text(WORKER)
        for name, text in tools.items():
            (work / "bin" / name).write_text(text)
            (work / "bin" / name).chmod(0o755)
        environment = {
            **os.environ, "PATH": f"{work}/bin:{os.environ['PATH']}", "WORK": str(work), "ROLE": role,
            "DELIVERY": delivery, "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_END_TIME": "1", **more,
        }  # fmt: skip
        with (work / "log").open("wb") as log:
            self.process = subprocess.Popen(
                ["bash", SLURM / script, "--config", "c.yaml"], cwd=ROOT, env=environment, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # srun's session is another one: whoever has our folder in its environment goes
        for status in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"WORK={self.work}\0" in status.read_text():
                    os.kill(int(status.parts[2]), signal.SIGKILL)
        self.process.wait(10)

    def wait_for_worker(self):
        deadline = time.monotonic() + 30
        while not (self.work / "ready").exists():
            assert time.monotonic() < deadline, "the worker did not start"
            time.sleep(0.05)

    def ask(self):
        """Send USR1 to the batch shell alone once the worker listens, as ``--signal=B:`` does."""
        self.wait_for_worker()
        self.process.send_signal(signal.SIGUSR1)

    def told(self, name):
        path = self.work / name
        return path.read_text() if path.exists() else ""


@pytest.mark.distributed
@pytest.mark.parametrize("delivery", ["leader", "all"])
def test_a_job_whose_time_is_up_saves_once_and_queues_itself(tmp_path, delivery):
    with Job(tmp_path, "good", delivery) as job:
        job.ask()
        job.process.wait(30)
        assert job.told("saved") == "saved\n"
        assert job.told("survived") == "75", "the launcher must outlive the signal"
        assert job.told("scontrol") == "requeue 123\n"
        assert job.told("launched").startswith(
            "launch --config_file launch/accelerate/ddp.yaml --num_machines 2 --machine_rank 0 --num_processes 8 "
            "--main_process_ip node7 --main_process_port 10123 launch/train.py --config c.yaml"
        )


@pytest.mark.distributed
def test_a_job_that_cannot_save_in_time_is_queued_all_the_same(tmp_path):
    with Job(tmp_path, "deaf", GRACE="1") as job:
        job.ask()
        job.process.wait(30)
        assert "goes back to the last checkpoint" in job.told("log")
        assert job.told("scontrol") == "requeue 123\n"


@pytest.mark.distributed
@pytest.mark.parametrize(("role", "status"), [("done", 0), ("broken", 1)])
def test_a_job_that_is_done_or_broken_is_not_queued_again(tmp_path, role, status):
    with Job(tmp_path, role) as job:
        assert job.process.wait(30) == status
        assert job.told("scontrol") == ""


@pytest.mark.distributed
@pytest.mark.parametrize(("node", "status"), [("0", 1), ("1", 0)])
def test_a_node_that_is_told_to_end_saves_and_waits_for_its_launcher(tmp_path, node, status):
    """TERM to all comes before preemption, and when another node failed. The first node speaks for all that save."""
    address = {"SLURM_NODEID": node, "MASTER_ADDR": "node7", "MASTER_PORT": "10123", "ACCELERATE_CONFIG": "x.yaml"}
    with Job(tmp_path, "good", script="node.sh", **address) as job:
        job.wait_for_worker()
        job.process.terminate()
        assert job.process.wait(30) == status
        assert (job.told("saved"), job.told("survived")) == ("saved\n", "75")


@pytest.mark.distributed
def test_the_dask_recipe_shards_with_the_workers_it_starts(counts, tmp_path):
    """dask-jobqueue is stood in for by a cluster of this machine; which arguments it gets is looked at."""
    (tmp_path / "dask_jobqueue.py").write_text(
        "import pathlib\nfrom distributed import LocalCluster\n"
        "class SLURMCluster(LocalCluster):\n"
        "    def __init__(self, **given):\n"
        "        pathlib.Path('given').write_text(repr(sorted(given.items())))\n"
        "        super().__init__(n_workers=1, threads_per_worker=1, dashboard_address='127.0.0.1:0')\n"
        "    def adapt(self, **given):\n"
        "        pathlib.Path('jobs').write_text(repr(sorted(given.items())))\n"
    )
    counts.write_h5ad(tmp_path / "a.h5ad")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, SLURM / "shard_dask.py", "--jobs", "2", "--cores", "3", "a.h5ad", "--out", "atlas.zarr"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "199 cells x 30 genes" in done.stdout
    assert (tmp_path / "jobs").read_text() == "[('maximum_jobs', 2), ('minimum_jobs', 2)]"
    assert "('processes', 3)" in (tmp_path / "given").read_text()
