"""scripts/gke_job.sh and the JobSet it fills in, read as YAML, never sent anywhere."""

from __future__ import annotations

import pathlib
import subprocess

import pytest
import yaml

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"
IMAGE = ("--image", "us-docker.pkg.dev/p/r/deevisum:1")
MAIN = ("--config", "configs/quickstart.py", "--workdir", "gs://bucket/first")


def gke_job(*args: str) -> subprocess.CompletedProcess:
    """A dry run: kubectl is not called."""
    return subprocess.run(
        ["bash", str(SCRIPTS / "gke_job.sh"), args[0], "--dry_run", *args[1:]],
        capture_output=True,
        text=True,
        timeout=30,
    )


def job_set(*args: str) -> dict:
    done = gke_job("run", "--name", "first", *IMAGE, *args)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize(
    ("topology", "accelerator", "hosts"),
    [
        ("v5e:4x4", "tpu-v5-lite-podslice", 4),
        ("v5p:2x4x4", "tpu-v5p-slice", 8),
        ("v6e:16x16", "tpu-v6e-slice", 64),
        ("v5p:2x2x1", "tpu-v5p-slice", 1),
        ("v4:4x8x12", "tpu-v4-podslice", 96),
    ],
)
def test_a_pod_for_every_host_of_the_slice(topology, accelerator, hosts):
    job = job_set("--topology", topology, *MAIN)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["image"] == IMAGE[1]
    assert container["command"] == ["python", "-m", "deevisum_jax.main", *MAIN]


def test_restarts_on_75_and_on_lost_nodes_and_fails_on_a_mistake():
    """Rules are tried in order; a Job that a FailJob rule ended has the reason PodFailurePolicy."""
    spec = job_set("--topology", "v5e:4x4", *MAIN)["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 100
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    lost, mistake = job["podFailurePolicy"]["rules"]
    assert lost == {
        "action": "Count",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    assert mistake["action"] == "FailJob"
    assert mistake["onExitCodes"]["operator"] == "NotIn"
    assert {75, 137} <= set(mistake["onExitCodes"]["values"])
    assert {0, 1, 2}.isdisjoint(mistake["onExitCodes"]["values"])
    pod = job["template"]["spec"]
    assert mistake["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert pod["terminationGracePeriodSeconds"] >= 120


def test_one_job_has_a_slice_for_itself():
    annotations = job_set("--topology", "v5e:4x4", *MAIN)["metadata"]["annotations"]
    assert annotations == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


def test_words_of_a_command_stay_whole():
    words = ["bash", "-c", 'echo "a: b" \\n # no comment, [no] {list}', "one\n\n  two\t\r\nthree\n"]
    job = job_set("--topology", "v5e:4x4", "--", *words)["spec"]["replicatedJobs"][0]["template"]
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command == words


def test_flags_are_taken_as_tpu_pod_takes_them():
    override = "--config.eval.f1=it's 'max'"
    args = ("--name=first", "--topology=v5e:4x4", f"--image={IMAGE[1]}", f"--config={MAIN[1]}")
    done = gke_job("run", *args, f"--workdir={MAIN[3]}", override)
    assert done.returncode == 0, done.stderr
    job = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "deevisum_jax.main", *MAIN, override]


def test_stop_deletes_the_job():
    assert gke_job("stop", "--name", "first").stdout == "kubectl delete jobset first\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("start", "--name", "first"), "choose one of run, log, status, stop"),
        (("run", "--nmae", "first"), "unknown flag '--nmae'"),
        (("run", "--name", "First"), "lower-case letters"),
        (("run", "--name", "first", "--topology", "v5:4x4", *IMAGE, *MAIN), "one of v4, v5e, v5p"),
        (
            ("run", "--name", "first", "--topology", "v5p:4x4", *IMAGE, *MAIN),
            "there are 2x2x1 2x2x2",
        ),
        (
            ("run", "--name", "first", "--topology", "v5p:4x4x6", *IMAGE, *MAIN),
            "then multiples of 4x4x4",
        ),
        (
            ("run", "--name", "first", "--topology", "v6e:4x4x4", *IMAGE, *MAIN),
            "there are 1x1 2x2",
        ),
        (
            ("run", "--name", "first", "--topology", "v5e:3x4", *IMAGE, *MAIN),
            "no slice of v5e has that shape",
        ),
        (("run", "--name="), "--name needs a value"),
        (
            ("run", "--name", "first", "--topology", "v5e:4x4", *IMAGE, "--", "echo", "\a"),
            "control character",
        ),
        (("run", "--name", "first", "--topology", "v5e:4x4", *IMAGE, "--"), "nothing after --"),
        (
            ("run", "--name", "first", "--topology", "v5e:4x4", *IMAGE, *MAIN, "--config.steps"),
            "write overrides as",
        ),
        (
            (
                *("run", "--name", "first", "--topology", "v5e:4x4", *IMAGE),
                *("--config", "configs/none.py", *MAIN[2:]),
            ),
            "'configs/none.py' is no file in",
        ),
        (("run", "--name", "first", "--topology", "v5e:4x4", *MAIN), "--image is missing"),
        (("run", "--name", "first", "--topology", "v5e:4x4", *IMAGE), "--config is missing"),
        (
            ("run", "--name", "first", "--topology", "v5e:4x4", *IMAGE, *MAIN[:3], "runs/first"),
            "give a bucket, such as",
        ),
    ],
)
def test_a_mistake_is_told(args, message):
    done = gke_job(*args)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
