"""Many small packs through the real driver: nothing is lost, and it keeps nothing open."""

import psutil
import pytest

import rayx
from rayx.sweep import Placement, run_sweep
from tests.test_sweep import Scripted, small_specs

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_a_sweep_of_many_packs_is_complete_and_leaves_no_file_open(
    ray_cluster, tiny_corpus, tmp_path
):
    (tmp_path / "log").touch()
    script = Scripted(str(tmp_path / "log"))
    store = rayx.open(tmp_path / "store", create=True)
    specs = small_specs(tiny_corpus, 300)
    run_sweep(specs[:2], tiny_corpus, store, script)  # what is opened once is open now
    before = psutil.Process().num_fds()
    status = run_sweep(specs, tiny_corpus, store, script, placement=Placement(pack_size=3))
    assert status == {spec.run_id: "ok" for spec in specs}
    assert sorted(script.calls()) == sorted(status)
    assert psutil.Process().num_fds() <= before + 2
    assert sorted(store.runs()["run_id"]) == sorted(status)
    assert store.parts.damaged_records() == []
