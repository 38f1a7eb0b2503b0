"""The cluster of a sweep: how to reach it, what fits now, what an autoscaler may still bring."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated import autoscaler_pb2

from rayx.errors import SweepError

if TYPE_CHECKING:
    from rayx.sweep.run import Placement

log = logging.getLogger(__name__)

AHEAD = 8  # trials asked for beyond those that fit now, at least
MAX_AHEAD = 256  # at most: each is a placement request that Ray looks at again and again
AUTOSCALER_SECONDS = 20.0  # in which an autoscaler has said what it thinks of a request
LOOK_SECONDS = 1.0  # between two looks at the nodes
BOOTSTRAP = "~/ray_bootstrap_config.yaml"  # where `ray up` leaves the node types, on the head


def connect(placement: Placement) -> None:
    """Connect to Ray, or start one that lives as long as this process.

    Raises:
        SweepError: The cluster cannot be reached, or no node can hold a trial: none that is there,
            and where `placement.elastic` none that its autoscaler can bring.
    """
    reach(placement.address, dashboard=False)  # in Train's local mode nothing polls it
    if capacity(placement):
        return
    if placement.elastic:
        _ask_autoscaler(placement)
        return
    offers = "; ".join(_offer(node) for node in _nodes()) or "nothing: there are none"
    raise SweepError(
        f"A trial needs {needs(placement)} on one node; the nodes offer {offers}. Ask for less, "
        "or use --elastic where an autoscaler brings more."
    )


def reach(address: str | None, dashboard: bool) -> None:
    """Connect to the Ray at an address, or at RAY_ADDRESS, or start one.

    Raises:
        SweepError: It cannot be reached.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {} if address else {"include_dashboard": dashboard}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SweepError(
            f"Cannot connect to Ray at {address!r}: {error}. Check the address, and that "
            "RAY_AUTH_MODE=token is set where the cluster asks for a token."
        ) from error


def capacity(placement: Placement) -> int:
    """Return how many trials the nodes that are there hold."""
    return sum(_trials(node, placement) for node in _nodes())


class Room:
    """How many trials may be in hand, running or asked for; calling it looks at the nodes.

    An autoscaler brings nodes for what is asked for: as many trials again as fit now, so that the
    cluster doubles, and AHEAD to begin with. Elsewhere one that waits is enough.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._room, self._looked = 0, -LOOK_SECONDS

    def __call__(self) -> int:
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            fits = capacity(self._placement)
            ahead = min(MAX_AHEAD, max(AHEAD, fits)) if self._placement.elastic else 1
            self._room, self._looked = fits + ahead, time.monotonic()
        return self._room


def needs(placement: Placement) -> str:
    """Return what a trial needs, in words."""
    return f"{placement.cpus:g} CPU and {placement.gpus:g} GPU"


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _offer(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU"


def _trials(resources: Mapping[str, float], placement: Placement) -> int:
    wanted = {"CPU": placement.cpus, "GPU": placement.gpus}
    return min(int(resources.get(kind, 0) / some + 1e-9) for kind, some in wanted.items() if some)


def _ask_autoscaler(placement: Placement) -> None:
    """Ask for room for one trial; return as soon as it comes, or nothing is said against it."""
    wanted = {"CPU": placement.cpus, "GPU": placement.gpus}
    group = ray.util.placement_group([{kind: some for kind, some in wanted.items() if some}])
    try:
        deadline = time.monotonic() + AUTOSCALER_SECONDS
        while time.monotonic() < deadline and not capacity(placement):
            state = _autoscaling_state()
            refused = state.infeasible_gang_resource_requests
            types = _node_types()
            if any(request.details.startswith(group.id.hex()) for request in refused) and not any(
                _trials(resources, placement) for resources in types.values()
            ):
                known = "; ".join(f"{name} ({_offer(r)})" for name, r in types.items())
                raise SweepError(
                    f"A trial needs {needs(placement)} on one node, and the autoscaler has no node "
                    f"type that can hold it{': it has ' + known if known else ''}. Ask for less, "
                    "or add such a node type to the cluster."
                )
            if state.pending_instance_requests or state.pending_instances:
                return
            time.sleep(0.2)
    finally:
        ray.util.remove_placement_group(group)
    if not capacity(placement):
        log.warning(
            "No node can hold a trial (%s), and no autoscaler has said that it brings one; waiting",
            needs(placement),
        )


def _autoscaling_state() -> Any:
    """Return what the autoscaler said last; empty where there is none or it cannot be asked."""
    reply = autoscaler_pb2.GetClusterStatusReply()  # pyright: ignore[reportAttributeAccessIssue]
    with contextlib.suppress(Exception):  # an autoscaler of the first kind, or a ray:// client
        client = GcsClient(ray.get_runtime_context().gcs_address)
        reply.ParseFromString(client.get_cluster_status(timeout_s=5))
    return reply.autoscaling_state


def _node_types() -> dict[str, Mapping[str, float]]:
    """Return node type -> resources, as far as this machine knows them."""
    try:
        types = json.loads(Path(BOOTSTRAP).expanduser().read_text())["available_node_types"]
        return {name: node.get("resources", {}) for name, node in types.items()}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}
