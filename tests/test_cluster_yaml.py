"""cluster.yaml is accepted by Ray's own validation and is the cluster that its comments promise."""

import copy
import os
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "cluster.yaml").read_text()
COMMANDS = [
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
]


@pytest.fixture
def config() -> dict:
    return yaml.safe_load(TEXT)


@pytest.fixture
def workers(config) -> dict[str, dict]:
    types = config["available_node_types"]
    return {name: node for name, node in types.items() if name != config["head_node_type"]}


def check(config: dict) -> None:
    validate_config(prepare_config(copy.deepcopy(config)))


def test_cluster_is_accepted_by_ray(config):
    check(config)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(idle_timeout_minute=5),
        lambda c: c.update(max_worker=5),
        lambda c: c.update(head_node_type="haed"),
        lambda c: c.update(max_workers="many"),
        lambda c: c["available_node_types"]["cpu_worker"].update(min_worker=1),
        lambda c: c["available_node_types"]["cpu_worker"].update(resources={"CPU": "all"}),
        lambda c: c["available_node_types"]["cpu_worker"].update(min_workers=17),
        lambda c: c.pop("provider"),
    ],
)
def test_cluster_with_a_mistake_is_refused_by_ray(config, change):
    change(config)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        check(config)


def test_head_takes_no_work_and_is_on_demand(config):
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]


def test_workers_are_spot_scale_to_zero_and_offer_cpus_and_gpus(config, workers):
    for name, node in workers.items():
        assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}, name
        assert node["min_workers"] == 0, name
        assert 0 < node["max_workers"] <= config["max_workers"], name
        assert node["resources"]["CPU"] > 0, name
    assert sum("GPU" in node["resources"] for node in workers.values()) == 1
    assert sum("GPU" not in node["resources"] for node in workers.values()) == 1


@pytest.mark.parametrize("key", COMMANDS)
def test_commands_are_valid_shell(config, key):
    for command in config.get(key, []):
        parsed = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert parsed.returncode == 0 and not parsed.stderr, (command, parsed.stderr)
        assert shlex.split(command)


def test_environment_line_is_written_once_and_understood_by_a_shell(config, tmp_path):
    (command,) = [c for c in config["setup_commands"] if ".bashrc" in c]
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    (tmp_path / ".bashrc").touch()
    for _ in range(2):  # `ray up` runs the setup again after every change
        subprocess.run(["bash", "-c", command], env=environment, check=True)
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 1
    told = subprocess.run(
        ["bash", "-c", ". ~/.bashrc; env"], env=environment, capture_output=True, text=True
    ).stdout
    assert "RAY_AUTH_MODE=token\n" in told
    assert "RAY_USAGE_STATS_ENABLED=0\n" in told
    assert f"PATH={tmp_path}/rayx-venv/bin:" in told


def test_mounts_are_what_setup_installs(config):
    mounts = config["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("--constraint constraints.txt" in c for c in config["setup_commands"])
    for remote, local in mounts.items():
        assert not os.path.isabs(local)
        if not local.startswith("~"):
            assert remote == f"~/rayx-source/{local}"
            assert (ROOT / local).exists(), f"`ray up` mounts {local}, which is missing"


def test_cluster_holds_no_secret_and_opens_no_port():
    assert "0.0.0.0" not in TEXT
    assert not re.search(r"AKIA[0-9A-Z]{16}|PRIVATE KEY|RAY_AUTH_TOKEN=", TEXT)


def test_fill_in_marks_what_is_particular_to_a_user():
    for word in ("region:", "availability_zone:", "ImageId:", "ssh_user:"):
        lines = [line for line in TEXT.splitlines() if line.strip().startswith(word)]
        assert lines and all("FILL IN" in line for line in lines), word


def test_how_to_submit_is_said_in_the_commands_own_words():
    assert re.search(r"ray job submit --working-dir \. -- rayx run \S+ --store s3://", TEXT)
