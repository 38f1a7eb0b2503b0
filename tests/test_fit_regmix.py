"""RegMix's released 1M proxies: 512 training rows, 256 test rows, 17 domains, 13 losses.

Needs the four CSVs of sail-sg/regmix in shared/reference/regmix beside the repository, or
RAYX_REFERENCE set to the folder that holds regmix/.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from rayx.fit import Table, evaluate_fit, fit_table, score

BESIDE = Path(__file__).parent.parent.parent / "shared" / "reference"
REGMIX = Path(os.environ.get("RAYX_REFERENCE", BESIDE)) / "regmix"
FILES = [
    REGMIX / f"{split}_{kind}_1m.csv"
    for split in ("train", "test")
    for kind in ("mixture", "pile_loss")
]
pytestmark = pytest.mark.skipif(
    not all(path.exists() for path in FILES),
    reason="RegMix's CSVs are not there; set RAYX_REFERENCE to the folder that holds regmix/",
)


def load():
    return Table.from_csv(FILES[0], FILES[1]), Table.from_csv(FILES[2], FILES[3])


def random_rows(table, num, seed):
    rows = np.random.default_rng(seed).choice(len(table), num, replace=False)
    return dataclasses.replace(
        table,
        run_ids=tuple(table.run_ids[row] for row in rows),
        weights_RK=table.weights_RK[rows],
        losses_RM=table.losses_RM[rows],
    )


def mean_spearman(train, test, regressor):
    scores = score(fit_table(train, regressor), test)
    return np.mean([entry["spearman"] for entry in scores.values()])


def test_inverse_power_with_64_runs_ranks_as_well_as_regmix_with_512():
    train, test = load()
    assert len(train) == 512 and len(train.domains) == 17 and len(train.targets) == 13
    reached = [mean_spearman(random_rows(train, 64, d), test, "inverse-power") for d in (0, 1)]
    assert np.mean(reached) > 0.98


def test_inverse_power_with_all_runs_beats_regmix():
    train, test = load()
    assert mean_spearman(train, test, "inverse-power") > 0.9905


def test_tilted_power_with_64_runs_beats_the_additive_law_and_its_intervals_cover():
    train, test = load()
    test = test.aligned_to(train)
    spearmans, covered = [], []
    for draw in (0, 1):
        fitted = fit_table(random_rows(train, 64, draw), "tilted-power")
        spearmans.append(np.mean([entry["spearman"] for entry in score(fitted, test).values()]))
        low_RT, high_RT = fitted.interval(test.weights_RK, level=0.9)
        inside_RT = (low_RT <= test.losses_RM) & (test.losses_RM <= high_RT)
        covered.append(inside_RT.mean())
    assert np.mean(spearmans) > 0.984
    assert 0.85 < np.mean(covered) < 0.95


def test_auto_with_64_runs_is_not_worse_than_its_floor():
    train, test = load()
    few = random_rows(train, 64, 0)
    pile_cc = train.targets.index("metric/the_pile_pile_cc_val_loss")
    arxiv = train.targets.index("metric/the_pile_arxiv_val_loss")
    columns = [pile_cc, arxiv]
    few, test = (
        dataclasses.replace(
            table,
            targets=tuple(table.targets[column] for column in columns),
            losses_RM=table.losses_RM[:, columns],
        )
        for table in (few, test)
    )
    assert mean_spearman(few, test, "auto") > 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("regressor", "floor"), [("auto", 0.9915), ("lightgbm", 0.988)])
def test_acceptance_on_all_runs(regressor, floor):
    report = evaluate_fit(*load(), regressor=regressor)
    assert report["rows"] == {"train": 512, "test": 256}
    assert report["mean"]["test_spearman"] >= floor
