"""Stage 5, regression: the trained and the merged candidates of one sweep in one table.

A merged candidate costs an evaluation and no training, and its loss is not that of the run that it
stands for. The kind of proxy is a factor of the fit (factor.py): merged losses are translated to
the scale of the trained ones, target by target. How far they can be believed is measured on the
trained rows alone: each is predicted without itself and its merged partner, once from the other
trained rows and once with the merged rows added. Where that does not predict better, the merged
rows are left out of the target. Merged candidates of another operator or another set of experts
have a factor of their own.

Shapes: R runs, M merged rows, N trained rows, U their mixtures, K domains, T targets.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from rayx.fit.belief import AVERAGE, Belief, agreement, group_means, mixtures_of, noise_of
from rayx.fit.factor import Factor, estimate, partners
from rayx.fit.regressor import make_folds
from rayx.fit.scores import spearman
from rayx.fit.table import MIN_ROWS, Table, of_mixture_alone
from rayx.fit.tilted_power import TiltedPower

FOLDS = 5
MOST_ROWS = 400  # merged rows that a factor is found from; more would not move it
FAMILY = ("operator", "expert_set")  # columns whose values tell families of merged rows apart


@dataclass(frozen=True, kw_only=True, eq=False)
class Joint:
    """How the merged rows of a table were joined to the trained ones.

    Attributes:
        beliefs: One per group of merged rows and target, then one a group for the average.
        points: group, target, run_id, trained_bpb, merged_bpb: mixtures of trained runs that were
            also merged, or of too few, all of them with what a law of the merged rows says.
        words: What was done, in one line.
    """

    beliefs: tuple[Belief, ...]
    points: pd.DataFrame
    words: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; what is not known is None."""
        rows = [dataclasses.asdict(belief) for belief in self.beliefs]
        return {
            "words": self.words,
            "beliefs": [
                {key: None if value != value else value for key, value in row.items()}
                for row in rows
            ],
        }


def join_kinds(
    runs: pd.DataFrame,
    targets: tuple[str, ...] | list[str] | None = None,
    min_rows: int = MIN_ROWS,
    seed: int = 0,
) -> Table:
    """Return the table of a store's runs; merged rows, where they help, on the trained scale.

    Args:
        runs: As for Table.from_frame, of one scale; merged rows have kind "merge".
        targets: Losses to keep; all by default.
        min_rows: Fewest rows accepted.
        seed: Seed of the folds and of the bootstrap.

    Returns:
        A table whose `joint` tells what was found. Runs of one kind give Table.from_frame's.

    Raises:
        FitError: As Table.from_frame, both kinds accepted.
    """
    runs = of_mixture_alone(runs)
    used = runs.loc[runs["status"] == "ok"] if "status" in runs.columns else runs
    if "kind" not in used.columns or set(used["kind"]) != {"train", "merge"}:
        return Table.from_frame(runs, targets, min_rows)
    raw = Table.from_frame(runs.drop(columns="kind"), targets, min_rows)
    group_R = _groups(used)
    return _joined(raw, group_R, seed)


@threadpool_limits.wrap(limits=1)
def _joined(raw: Table, group_R: np.ndarray, seed: int) -> Table:
    trained_R = group_R == ""
    trained = _Trained(raw, trained_R, seed)
    losses_RM = raw.losses_RM.copy()
    weights_RK = raw.weights_RK.copy()
    beliefs, points = [], []
    for group in sorted(set(group_R) - {""}):
        rows = np.flatnonzero(group_R == group)
        if np.isfinite(raw.losses_RM[rows]).sum(0).max() < 2:  # one merge has no factor
            losses_RM[rows] = np.nan
            continue
        found = _Group(trained, group, raw.weights_RK[rows], raw.losses_RM[rows])
        losses_RM[rows] = found.translated_MT
        weights_RK[rows] = found.snapped_MK
        beliefs += found.beliefs
        points.append(found.points)
    keep_R = trained_R | np.isfinite(losses_RM).any(1)
    joint = Joint(
        beliefs=tuple(beliefs),
        points=pd.concat(points, ignore_index=True) if points else pd.DataFrame(),
        words=_words(beliefs, int(trained_R.sum()), int((keep_R & ~trained_R).sum())),
    )
    return dataclasses.replace(
        raw,
        run_ids=tuple(run for run, keep in zip(raw.run_ids, keep_R, strict=True) if keep),
        weights_RK=weights_RK[keep_R],
        losses_RM=losses_RM[keep_R],
        warnings=(*raw.warnings, joint.words),
        merged_R=~trained_R[keep_R] if (keep_R & ~trained_R).any() else None,
        joint=joint,
    )


class _Trained:
    """The trained rows, their mixtures, and what they say of each other."""

    def __init__(self, raw: Table, trained_R: np.ndarray, seed: int) -> None:
        self.targets, self.seed = raw.targets, seed
        self.weights_NK = raw.weights_RK[trained_R]
        self.losses_NT = raw.losses_RM[trained_R]
        run_ids = np.array(raw.run_ids)[trained_R]
        self.number_N = mixtures_of(self.weights_NK)
        first_U = np.unique(self.number_N, return_index=True)[1]
        self.mixtures_UK, self.run_ids_U = self.weights_NK[first_U], run_ids[first_U]
        self.means_UT = group_means(self.losses_NT, self.number_N, len(first_U))


class _Group:
    """The merged rows of one operator and expert set beside the trained rows."""

    def __init__(
        self, trained: _Trained, group: str, weights_MK: np.ndarray, losses_MT: np.ndarray
    ) -> None:
        self.trained, self.group = trained, group
        same_UM = partners(trained.mixtures_UK, weights_MK)
        paired_M = np.asarray(same_UM.any(0))
        # A partner is of the very mixture, so that folds never part the two.
        self.snapped_MK = np.where(
            paired_M[:, None], trained.mixtures_UK[same_UM.argmax(0)], weights_MK
        )
        number_M = np.where(paired_M, same_UM.argmax(0), -1)
        num_mixtures = len(trained.mixtures_UK)
        self.merged_UT = group_means(losses_MT, number_M, num_mixtures)
        self.law_UT = np.full((num_mixtures, len(trained.targets)), np.nan)
        self.alone_NT = np.full_like(trained.losses_NT, np.nan)
        self.joint_NT = np.full_like(trained.losses_NT, np.nan)
        self.translated_MT = np.full_like(losses_MT, np.nan)
        self.beliefs = []
        for t, target in enumerate(trained.targets):
            seen_M = np.isfinite(losses_MT[:, t])
            if seen_M.any():
                self.beliefs.append(self._target(t, target, losses_MT[:, t], seen_M))
        self.beliefs.append(self._average(len(weights_MK)))
        self.points = self._points()

    def _target(self, t: int, target: str, loss_M: np.ndarray, seen_M: np.ndarray) -> Belief:
        """Judge, translate and describe the merged rows of one target."""
        trained = self.trained
        seen_N = np.isfinite(trained.losses_NT[:, t])
        weights_NK, loss_N = trained.weights_NK[seen_N], trained.losses_NT[seen_N, t]
        weights_MK, loss_M = self.snapped_MK[seen_M], loss_M[seen_M]
        counts = {"trained": len(loss_N), "merged": len(loss_M)}
        positive = bool((loss_M > 0).all() and (loss_N > 0).all())
        law = TiltedPower().fit_point if positive and len(loss_M) >= MIN_ROWS else None
        if law is not None:
            self.law_UT[:, t] = law(weights_MK, loss_M)(trained.mixtures_UK)
        told = agreement(
            trained.means_UT[:, t], self.merged_UT[:, t], self.law_UT[:, t], trained.seed
        )
        plain = Belief(group=self.group, target=target, **counts, **told, kept=False)
        if not positive or len(loss_M) < 2 or len(loss_N) < 2:
            # Without a factor nothing is translated; with hardly a trained row nothing has to be.
            if len(loss_N) < 2:
                self.translated_MT[seen_M, t] = loss_M
                return dataclasses.replace(plain, kept=True)
            return plain
        factor = _factor(weights_MK, loss_M, weights_NK, loss_N)
        translated_M = factor.translate(weights_MK, loss_M)
        level = float(loss_N.mean())
        belief = dataclasses.replace(
            plain,
            shift=factor.shift,
            shift_se=factor.shift_se,
            slope=factor.slope,
            slope_se=factor.slope_se,
            tilt_bpb=level * float(factor.tilts(weights_MK).std()),
            residual_bpb=level * factor.residual_sd,
            noise_bpb=noise_of(loss_N, trained.number_N[seen_N]),
            kept=True,
        )
        if len(loss_N) >= MIN_ROWS:
            alone_N, joint_N = _held_out(weights_NK, loss_N, weights_MK, loss_M, trained.seed)
            self.alone_NT[seen_N, t], self.joint_NT[seen_N, t] = alone_N, joint_N
            scores = _scores(loss_N, alone_N, joint_N)
            belief = dataclasses.replace(
                belief, **scores, kept=scores["joint_bpb"] < scores["alone_bpb"]
            )
        if belief.kept:
            self.translated_MT[seen_M, t] = translated_M
        else:  # what the average is predicted from
            self.joint_NT[:, t] = self.alone_NT[:, t]
        return belief

    def _average(self, num_merged: int) -> Belief:
        """Describe the mean over the targets that the group has."""
        trained = self.trained
        columns = [trained.targets.index(belief.target) for belief in self.beliefs]
        told = agreement(
            trained.means_UT[:, columns].mean(1),
            self.merged_UT[:, columns].mean(1),
            self.law_UT[:, columns].mean(1),
            trained.seed,
        )
        loss_N, alone_N, joint_N = (
            values_NT[:, columns].mean(1)
            for values_NT in (trained.losses_NT, self.alone_NT, self.joint_NT)
        )
        seen_N = np.isfinite(loss_N) & np.isfinite(alone_N)
        enough = seen_N.sum() >= MIN_ROWS
        scores: dict[str, Any] = {}
        if enough:
            scores = _scores(loss_N[seen_N], alone_N[seen_N], joint_N[seen_N])
        counts = {"trained": int(np.isfinite(loss_N).sum()), "merged": num_merged}
        kept = any(belief.kept for belief in self.beliefs)
        return Belief(group=self.group, target=AVERAGE, **counts, **told, **scores, kept=kept)

    def _points(self) -> pd.DataFrame:
        """The losses that `agreement` compares, a row per mixture and target."""
        trained, frames = self.trained, []
        for belief in self.beliefs:
            columns = [trained.targets.index(b.target) for b in self.beliefs[:-1]]
            if belief.target != AVERAGE:
                columns = [trained.targets.index(belief.target)]
            merged_UT = self.merged_UT if belief.basis == "pairs" else self.law_UT
            frame = {"group": self.group, "target": belief.target, "run_id": trained.run_ids_U}
            frame["trained_bpb"] = trained.means_UT[:, columns].mean(1)
            frame["merged_bpb"] = merged_UT[:, columns].mean(1)
            frames.append(pd.DataFrame(frame).dropna())
        return pd.concat(frames, ignore_index=True)


def _held_out(
    weights_NK: np.ndarray,
    loss_N: np.ndarray,
    weights_MK: np.ndarray,
    loss_M: np.ndarray,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Predict each trained row without it and its partners: from trained rows, and from all."""
    fit = TiltedPower().fit_point
    same_NM = partners(weights_NK, weights_MK)
    fold_N = make_folds(weights_NK, FOLDS, seed)
    alone_N, joint_N = np.empty(len(loss_N)), np.empty(len(loss_N))
    for fold in range(int(fold_N.max()) + 1):
        out_N = fold_N == fold
        in_M = ~same_NM[out_N].any(0)
        rest_NK, rest_N = weights_NK[~out_N], loss_N[~out_N]
        alone_N[out_N] = fit(rest_NK, rest_N)(weights_NK[out_N])
        if in_M.sum() < 2:  # nothing merged is left to add
            joint_N[out_N] = alone_N[out_N]
            continue
        factor = _factor(weights_MK[in_M], loss_M[in_M], rest_NK, rest_N)
        pick_M = _picked(np.any(same_NM[~out_N][:, in_M], axis=0))
        added_MK = weights_MK[in_M][pick_M]
        added_M = factor.translate(added_MK, loss_M[in_M][pick_M])
        both = np.concatenate([rest_NK, added_MK]), np.concatenate([rest_N, added_M])
        joint_N[out_N] = fit(*both)(weights_NK[out_N])
    return alone_N, joint_N


def _factor(
    weights_MK: np.ndarray, loss_M: np.ndarray, weights_NK: np.ndarray, loss_N: np.ndarray
) -> Factor:
    pick_M = _picked(np.any(partners(weights_NK, weights_MK), axis=0))
    return estimate(weights_MK[pick_M], loss_M[pick_M], weights_NK, loss_N)


def _picked(paired_M: np.ndarray) -> np.ndarray:
    """All rows, or of too many the paired ones and evenly spaced others, in order."""
    if len(paired_M) <= MOST_ROWS:
        return np.arange(len(paired_M))
    others = np.flatnonzero(~paired_M)
    count = min(len(others), max(MOST_ROWS - int(paired_M.sum()), MOST_ROWS // 2))
    spaced = others[np.linspace(0, len(others) - 1, count).round().astype(int)]
    return np.sort(np.r_[np.flatnonzero(paired_M), spaced])


def _scores(loss_N: np.ndarray, alone_N: np.ndarray, joint_N: np.ndarray) -> dict[str, Any]:
    """Fields of Belief; errors are absolute, for squares are decided by held-out experts alone."""
    scores = {}
    for name, told_N in (("alone", alone_N), ("joint", joint_N)):
        scores[f"{name}_spearman"] = spearman(told_N, loss_N)
        scores[f"{name}_bpb"] = float(np.mean(np.abs(told_N - loss_N)))
    return scores


def _groups(used: pd.DataFrame) -> np.ndarray:
    """Name each row's group of merged rows, "" for a trained one, shape (R,)."""
    merged_R = (used["kind"] == "merge").to_numpy()
    columns = [
        column
        for column in FAMILY
        if column in used.columns and used.loc[merged_R, column].nunique(dropna=False) > 1
    ]
    said = {"operator": "{}", "expert_set": "experts {}"}
    names = [
        " of ".join(said[c].format(v) for c, v in zip(columns, row, strict=True)) or "merged"
        for row in used[columns].to_numpy(dtype=object)
    ]
    return np.where(merged_R, np.array(names, dtype=object), "")


def _words(beliefs: list[Belief], num_trained: int, num_merged: int) -> str:
    """Say in one line what was joined."""
    by_target = [belief for belief in beliefs if belief.target != AVERAGE]
    kept = sum(belief.kept for belief in by_target)
    start = f"{num_trained} trained and {num_merged} merged runs are fitted jointly"
    if not kept:
        return (
            f"merged runs are left out of the fit of {num_trained} trained ones: held-out trained "
            "runs are predicted no better with them"
        )
    groups = len({belief.group for belief in by_target})
    end = f"merged losses are translated, and kept for {kept} of {len(by_target)} targets"
    end += f" (each of {groups} groups of merges counted apart)" if groups > 1 else ""
    if any(belief.kept and not belief.judged for belief in by_target):
        end += f", unchecked where fewer than {MIN_ROWS} trained runs have a loss"
    return f"{start}: {end}"
