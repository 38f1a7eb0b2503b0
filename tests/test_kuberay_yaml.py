"""kuberay.yaml keeps the documented fields of ray.io/v1 and is the cluster of cluster.yaml.

The schema below is the part of the operator's CRDs and of Kubernetes' pods that the file may use:
as in the CRD an unknown field is a mistake, which the API server would silently drop.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "kuberay.yaml").read_text()
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())


def fields(required: str = "", **properties) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
WORD, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"}
AMOUNTS = {"type": "object", "additionalProperties": QUANTITY}


def some(item: dict) -> dict:
    return {"type": "array", "items": item}


CONTAINER = fields(
    "name image",
    name=WORD,
    image=WORD,
    ports=some(fields("containerPort", containerPort=COUNT, name=WORD)),
    resources=fields("requests limits", requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts=some(fields("name mountPath", name=WORD, mountPath=WORD)),
    env=some(fields("name", name=WORD, value=WORD, valueFrom={"type": "object"})),
)
POD = fields(
    "spec",
    metadata={"type": "object"},
    spec=fields(
        "containers",
        serviceAccountName=WORD,
        restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
        nodeSelector=TEXTS,
        tolerations=some(
            fields(
                key=WORD,
                operator={"enum": ["Exists", "Equal"]},
                value=WORD,
                effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
            )
        ),
        terminationGracePeriodSeconds=COUNT,
        containers={**some(CONTAINER), "minItems": 1},
        volumes=some(fields("name", name=WORD, emptyDir={"type": "object"})),
    ),
)
WORKERS = fields(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=WORD,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    rayStartParams=TEXTS,
    template=POD,
)
CLUSTER_SPEC = fields(
    "headGroupSpec",
    rayVersion=WORD,
    authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=WORD),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=COUNT,
    ),
    headGroupSpec=fields("rayStartParams template", rayStartParams=TEXTS, template=POD),
    workerGroupSpecs=some(WORKERS),
)
RAYJOB = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields("name", name={"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,45})$"}),
    spec=fields(
        "entrypoint rayClusterSpec",
        entrypoint=WORD,
        entrypointNumCpus={"type": "number", "minimum": 0},
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        backoffLimit=COUNT,
        submitterConfig=fields(backoffLimit=COUNT),
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        runtimeEnvYAML=WORD,
        rayClusterSpec=CLUSTER_SPEC,
    ),
)


@pytest.fixture
def job() -> dict:
    return yaml.safe_load(TEXT)


@pytest.fixture
def spec(job) -> dict:
    return job["spec"]["rayClusterSpec"]


def check(job: dict) -> None:
    """Keep the schema, and what the operator checks beyond it."""
    jsonschema.validate(job, RAYJOB)
    body = job["spec"]
    if body.get("ttlSecondsAfterFinished") and not body.get("shutdownAfterJobFinishes"):
        raise ValueError("ttlSecondsAfterFinished works only with shutdownAfterJobFinishes")
    cluster = body["rayClusterSpec"]
    names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    if len(set(names)) < len(names):
        raise ValueError("two worker groups have one name")
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        if group.get("minReplicas", 0) > group.get("maxReplicas", 0):
            raise ValueError(f"{group['groupName']}: more at least than at most")
        pod = group["template"]["spec"]
        known = {volume["name"] for volume in pod.get("volumes", [])}
        for mount in pod["containers"][0].get("volumeMounts", []):
            if mount["name"] not in known:
                raise ValueError(f"volume {mount['name']} is mounted and not there")
    yaml.safe_load(body.get("runtimeEnvYAML", ""))


def test_manifest_keeps_the_documented_fields(job):
    check(job)


@pytest.mark.parametrize(
    "change",
    [
        lambda j: j.update(apiVersion="ray.io/v1alpha1"),
        lambda j: j["spec"].update(shutdownAfterJobFinish=True),
        lambda j: j["spec"].update(shutdownAfterJobFinishes=False),
        lambda j: j["spec"].update(submissionMode="ssh"),
        lambda j: j["spec"].pop("entrypoint"),
        lambda j: j["spec"]["rayClusterSpec"].pop("headGroupSpec"),
        lambda j: j["spec"]["rayClusterSpec"]["authOptions"].update(mode="on"),
        lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update(n=0),
        lambda j: j["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas=99),
        lambda j: j["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(groupName="gpu-worker"),
        lambda j: j["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"].update(
            volumes=[]
        ),
    ],
)
def test_manifest_with_a_mistake_is_refused(job, change):
    changed = copy.deepcopy(job)
    change(changed)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        check(changed)


def test_versions_are_those_of_the_constraints_and_of_this_ray(spec):
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert spec["rayVersion"] == pinned[1] == ray.__version__
    assert f"rayproject/ray:{pinned[1]}" in TEXT and "--constraint" in TEXT
    images = re.findall(r"^ +image: (\S+)", TEXT, re.M)
    assert len(images) == 3 and len(set(images)) == 1  # one image, so one Python


def test_token_is_on_and_comes_from_a_secret(job, spec):
    assert spec["authOptions"] == {"mode": "token", "secretName": "rayx-token"}
    assert "create secret generic rayx-token --from-literal=auth_token=" in TEXT
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert not [name for name in environment if re.search("TOKEN|SECRET|KEY", name)]
    assert not re.search(r"AKIA[0-9A-Z]{16}|PRIVATE KEY|AWS_SECRET|auth_token: ", TEXT)
    pods = [g["template"]["spec"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    assert all(pod["serviceAccountName"] == "rayx" for pod in pods)


def test_head_takes_no_work_and_the_driver_asks_for_none(job, spec):
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    head = CLUSTER["available_node_types"][CLUSTER["head_node_type"]]
    assert head["resources"]["CPU"] == 0 == job["spec"]["entrypointNumCpus"]


def test_workers_are_those_of_the_cluster_and_scale_to_zero(spec):
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    idle = spec["autoscalerOptions"]["idleTimeoutSeconds"]
    assert idle == 60 * CLUSTER["idle_timeout_minutes"]
    for group in spec["workerGroupSpecs"]:
        other = CLUSTER["available_node_types"][group["groupName"].replace("-", "_")]
        assert group["replicas"] == group["minReplicas"] == other["min_workers"] == 0
        assert group["maxReplicas"] == other["max_workers"]
        offered = {k: int(v) for k, v in group["rayStartParams"].items()}
        assert offered["num-cpus"] == other["resources"]["CPU"]
        assert offered.get("num-gpus", 0) == other["resources"].get("GPU", 0)
        container = group["template"]["spec"]["containers"][0]["resources"]
        assert container["requests"] == container["limits"]  # Ray believes in the limits
        assert int(container["limits"]["cpu"]) == offered["num-cpus"]
        assert int(container["limits"].get("nvidia.com/gpu", 0)) == offered.get("num-gpus", 0)
        assert group["template"]["spec"]["restartPolicy"] == "Never"  # autoscaler v2 asks for it


def test_environment_is_that_of_the_cluster(job):
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    (line,) = [c for c in CLUSTER["setup_commands"] if ".bashrc" in c]
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"):
        assert f"{name}={environment[name]}" in line


def test_entrypoint_is_a_command_of_rayx_and_ends_with_everything_gone(job):
    body = job["spec"]
    assert re.fullmatch(r"rayx run \S+\.py --store s3://\S+ --elastic", body["entrypoint"])
    assert body["shutdownAfterJobFinishes"] is True and body["backoffLimit"] > 0


def test_fill_in_marks_what_is_particular_to_a_user():
    for word in ("image:", "serviceAccountName:", "nodeSelector:"):
        lines = TEXT.splitlines()
        found = [i for i, line in enumerate(lines) if line.strip().startswith(word)]
        assert found and all("FILL IN" in "".join(lines[i - 2 : i + 1]) for i in found), word
