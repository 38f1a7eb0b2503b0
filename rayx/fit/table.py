"""Stage 5, regression: the table of runs that a regressor is fitted on.

One row a run: its mixture weights and its losses. Everything that can be wrong with a user's CSV is
found here, named by file, row and column, before anything is fitted. Missing losses are allowed and
masked; missing weights are not.

Shapes: R runs, K domains, M targets, C columns of either kind.
"""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from rayx.errors import FitError, did_you_mean
from rayx.fit.csv_files import check_csv

if TYPE_CHECKING:
    from rayx.fit.kinds import Joint

MIN_ROWS = 8
SUM_TOLERANCE = 0.02  # RegMix's released weights are rounded to 3 decimals and sum to .996-1.003
SCALE = ("corpus", "params", "tokens", "trunk_tokens")  # columns in which the runs of a table agree
ONLY_MERGED = (
    "all {} runs are merged candidates: nothing trained says how far their losses can be believed"
)
MISSING = {"", "na", "nan", "null", "none"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Mixtures and losses of runs at one scale.

    Args:
        run_ids: One per row, unique.
        domains: Names of the columns of the weights, unique.
        targets: Names of the columns of the losses, unique.
        weights_RK: Mixture weights, >= 0; rows are renormalised to sum to 1.
        losses_RM: Losses; NaN is a missing cell.
        warnings: What was left out or looks odd, in words.
        merged_R: Which rows are merged candidates, their losses translated to the scale of the
            trained ones; None where all rows are of one kind.
        joint: How the two kinds were joined, where the runs were of both.

    Raises:
        FitError: A weight is negative or not finite, a row does not sum to 1 within 2%, a loss is
            infinite, a target has no loss at all, or names repeat.
    """

    run_ids: tuple[str, ...]
    domains: tuple[str, ...]
    targets: tuple[str, ...]
    weights_RK: np.ndarray
    losses_RM: np.ndarray
    warnings: tuple[str, ...] = ()
    merged_R: np.ndarray | None = None
    joint: Joint | None = None

    def __post_init__(self) -> None:
        weights_RK = np.array(self.weights_RK, dtype=float)
        losses_RM = np.array(self.losses_RM, dtype=float)
        for kind, names in (
            ("run id", self.run_ids),
            ("domain", self.domains),
            ("target", self.targets),
        ):
            _refuse_repeated(kind, names, "the table")
        for kind, array, names in (
            ("Weights", weights_RK, self.domains),
            ("Losses", losses_RM, self.targets),
        ):
            expected = (len(self.run_ids), len(names))
            if array.shape != expected:
                raise FitError(f"{kind} have shape {array.shape}; the names say {expected}.")
        if self.merged_R is not None and len(self.merged_R) != len(self.run_ids):
            raise FitError(f"merged_R has {len(self.merged_R)} rows, not {len(self.run_ids)}.")
        self._refuse_cells(~np.isfinite(weights_RK), weights_RK, self.domains, "finite weight")
        self._refuse_cells(weights_RK < 0, weights_RK, self.domains, "weight of 0 or more")
        self._refuse_cells(
            np.isinf(losses_RM),
            losses_RM,
            self.targets,
            "finite loss (leave the cell empty if the run diverged)",
        )
        sum_R = weights_RK.sum(1)
        for run_id, total in zip(self.run_ids, sum_R, strict=True):
            if abs(total - 1.0) > SUM_TOLERANCE:
                raise FitError(
                    f"The weights of run {run_id!r} sum to {total:g}; expected 1 within "
                    f"{SUM_TOLERANCE:.0%}. Divide the row by its sum, or remove the run."
                )
        missing_RM = np.isnan(losses_RM)
        for target, missing_R in zip(self.targets, missing_RM.T, strict=True):
            if missing_R.all():
                raise FitError(f"Target {target!r} has no loss in any of {len(missing_R)} runs.")
        # Cells that joining the kinds left out are no missing losses: `joint` tells of them.
        if missing_RM.any() and self.joint is None:
            counts = zip(self.targets, missing_RM.sum(0), strict=True)
            listed = ", ".join(f"{target} {count}" for target, count in counts if count)
            note = f"{missing_RM.sum()} losses are missing and masked: {listed}"
            if note not in self.warnings:  # `replace` passes through here again
                object.__setattr__(self, "warnings", (*self.warnings, note))
        object.__setattr__(self, "weights_RK", weights_RK / sum_R[:, None])
        object.__setattr__(self, "losses_RM", losses_RM)

    def _refuse_cells(
        self, bad_RC: np.ndarray, values_RC: np.ndarray, names: tuple[str, ...], expected: str
    ) -> None:
        for row, column in np.argwhere(bad_RC)[:1]:
            raise FitError(
                f"Run {self.run_ids[row]!r}, column {names[column]!r}: the value is "
                f"{values_RC[row, column]:g}; expected a {expected}."
            )

    def __len__(self) -> int:
        return len(self.run_ids)

    @classmethod
    def from_csv(
        cls, weights_csv: str | Path, losses_csv: str | Path, min_rows: int = MIN_ROWS
    ) -> Table:
        """Join a CSV of weights and a CSV of losses on their first columns.

        Args:
            weights_csv: An id, then one column per domain.
            losses_csv: An id, then one column per target; an empty cell is a missing loss.
            min_rows: Fewest joined rows accepted.

        Raises:
            FitError: A file is missing, empty, not UTF-8 or not rectangular; ids or columns repeat;
                a cell is not a number; fewer than `min_rows` ids are in both files; or what Table
                refuses. The message names the file, the row's id and the column.
        """
        domains, weights = _read_csv(Path(weights_csv), missing_allowed=False)
        targets, losses = _read_csv(Path(losses_csv), missing_allowed=True)
        run_ids = [run_id for run_id in weights if run_id in losses]
        if not run_ids:
            raise FitError(
                f"{weights_csv} and {losses_csv} have no ids in common: the first begins with "
                f"{next(iter(weights))!r}, the second with {next(iter(losses))!r}."
            )
        warnings = [
            f"{count} ids are only in {path} and were left out"
            for path, count in (
                (weights_csv, len(weights) - len(run_ids)),
                (losses_csv, len(losses) - len(run_ids)),
            )
            if count
        ]
        _refuse_few(len(run_ids), min_rows, f"{weights_csv} and {losses_csv} join to")
        return cls(
            run_ids=tuple(run_ids),
            domains=domains,
            targets=targets,
            weights_RK=np.array([weights[run_id] for run_id in run_ids]),
            losses_RM=np.array([losses[run_id] for run_id in run_ids]),
            warnings=tuple(warnings),
        )

    @classmethod
    def from_frame(
        cls,
        runs: pd.DataFrame,
        targets: tuple[str, ...] | list[str] | None = None,
        min_rows: int = MIN_ROWS,
    ) -> Table:
        """Take the rows of a store's runs whose status is "ok"; see also `of_mixture_alone`.

        Args:
            runs: Columns run_id, status, weight/<domain>, loss/<target>; kind, "train" or "merge".
            targets: Losses to keep; all by default.
            min_rows: Fewest rows accepted.

        Raises:
            FitError: A column is missing, a target is unknown, fewer than `min_rows` rows are ok,
                the runs are of both kinds or of several scales, or what Table refuses.
        """
        for column in ("run_id", "status"):
            if column not in runs.columns:
                raise FitError(f"The runs have no column {column!r}; they have {list(runs)[:8]}.")
        _refuse_repeated("column", tuple(map(str, runs.columns)), "the runs")
        domains = _named(runs, "weight/")
        known = _named(runs, "loss/")
        for target in targets or ():
            if target not in known:
                raise FitError(
                    f"The runs have no target {target!r}; they have {', '.join(known)}."
                    f"{did_you_mean(target, known)}"
                )
        chosen = tuple(targets or known)
        runs = of_mixture_alone(runs)
        used = runs.loc[runs["status"] == "ok"]
        for column in SCALE:
            values = used[column].unique() if column in used.columns else ()
            if len(values) > 1:
                raise FitError(
                    f"The runs have {len(values)} values of {column} ({values[0]}, {values[1]}); "
                    "a table holds one. Take the rows of one, e.g. with largest_scale."
                )
        kinds = sorted(used["kind"].astype(str).unique()) if "kind" in used.columns else []
        if len(kinds) > 1:
            raise FitError(
                f"The runs are of {len(kinds)} kinds ({', '.join(kinds)}), whose losses differ; "
                "expected one. Join them with rayx.fit.join_kinds, or take the rows of one."
            )
        warnings = (ONLY_MERGED.format(len(used)),) if kinds == ["merge"] else ()
        if len(used) < len(runs):
            others = Counter(runs.loc[runs["status"] != "ok", "status"].astype(str))
            counts = ", ".join(f"{count} {status}" for status, count in sorted(others.items()))
            warnings += (f"{len(used)} of {len(runs)} runs used; {counts}",)
        _refuse_few(len(used), min_rows, "The runs with status 'ok' are")
        return cls(
            run_ids=tuple(used["run_id"].astype(str)),
            domains=domains,
            targets=chosen,
            weights_RK=_floats(used, [f"weight/{domain}" for domain in domains]),
            losses_RM=_floats(used, [f"loss/{target}" for target in chosen]),
            warnings=warnings,
        )

    def aligned_to(self, other: Table) -> Table:
        """This table with the columns in the order of another.

        Raises:
            FitError: The domains or targets are not the same; the message says which differ.
        """
        for kind, mine, theirs in (
            ("domains", self.domains, other.domains),
            ("targets", self.targets, other.targets),
        ):
            extra, lacking = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
            if extra or lacking:
                raise FitError(
                    f"The test table has other {kind} than the training table: "
                    f"only in test: {', '.join(extra) or 'none'}; "
                    f"only in training: {', '.join(lacking) or 'none'}."
                )
        domain_order = [self.domains.index(domain) for domain in other.domains]
        target_order = [self.targets.index(target) for target in other.targets]
        return dataclasses.replace(
            self,
            domains=other.domains,
            targets=other.targets,
            weights_RK=self.weights_RK[:, domain_order],
            losses_RM=self.losses_RM[:, target_order],
        )


def largest_scale(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the corpus, size and token count that most runs share.

    Losses of different scales or data are never pooled. Merged candidates are of the scale of the
    runs that they stand for: their kind is a factor of the fit, see `join_kinds`.
    """
    runs, columns = of_mixture_alone(runs), [column for column in SCALE if column in runs.columns]
    if runs.empty or not columns:
        return runs
    return max((group for _, group in runs.groupby(columns, sort=True)), key=len)


def of_mixture_alone(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs without those that a policy steered or a teacher taught.

    Their losses depend on more than the average mixture, so they belong in no regressor or law.
    """
    others = [column for column in ("policy", "teacher") if column in runs.columns]
    return runs.loc[runs[others].isna().all(axis=1)]


def _named(runs: pd.DataFrame, prefix: str) -> tuple[str, ...]:
    names = tuple(
        str(column)[len(prefix) :] for column in runs.columns if str(column).startswith(prefix)
    )
    if not names:
        raise FitError(f"The runs have no column {prefix}<name>; they have {list(runs)[:8]}.")
    return names


def _floats(runs: pd.DataFrame, columns: list[str]) -> np.ndarray:
    try:
        return np.stack([np.array(runs[column], dtype=float) for column in columns], axis=1)
    except (TypeError, ValueError) as error:
        raise FitError(f"The columns {', '.join(columns)} hold no numbers: {error}.") from None


def _refuse_repeated(kind: str, names: tuple[str, ...], where: str) -> None:
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise FitError(f"The {kind} {name!r} occurs {count} times in {where}; expected once.")


def _refuse_few(num_rows: int, min_rows: int, start: str) -> None:
    if num_rows < min_rows:
        raise FitError(f"{start} {num_rows} rows; expected at least {min_rows}.")


def _read_csv(path: Path, missing_allowed: bool) -> tuple[tuple[str, ...], dict[str, list[float]]]:
    """Read id -> numbers; the names of the number columns come first."""
    check_csv(path, FitError)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FitError(
            f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8 CSV."
        ) from None
    except OSError as error:
        raise FitError(f"{path} cannot be read: {error.strerror}.") from None
    if "\0" in text:
        raise FitError(f"{path} holds zero bytes, so it is not CSV text.")
    try:
        lines = [line for line in csv.reader(text.splitlines()) if any(map(str.strip, line))]
    except csv.Error as error:
        raise FitError(f"{path} is not valid CSV: {error}.") from None
    if len(lines) < 2:
        raise FitError(f"{path} is empty; expected a header and one row a run.")
    header, rows = [name.strip() for name in lines[0]], lines[1:]
    if len(header) < 2:
        raise FitError(f"{path} has one column only ({header[0]!r}); expected an id and numbers.")
    _refuse_repeated("column", tuple(header), str(path))
    _refuse_repeated("id", tuple(row[0].strip() for row in rows), str(path))
    numbers: dict[str, list[float]] = {}
    for row in rows:
        run_id = row[0].strip()
        if len(row) != len(header):
            raise FitError(
                f"{path}, row {run_id!r}: it has {len(row)} cells; the header has {len(header)}."
            )
        numbers[run_id] = [
            _number(cell.strip(), missing_allowed, f"{path}, row {run_id!r}, column {column!r}")
            for column, cell in zip(header[1:], row[1:], strict=True)
        ]
    return tuple(header[1:]), numbers


def _number(cell: str, missing_allowed: bool, where: str) -> float:
    if missing_allowed and cell.lower() in MISSING:
        return float("nan")
    try:
        return float(cell)
    except ValueError:
        shown = f"{cell!r:.80}" if cell else "empty"
        raise FitError(f"{where}: the value is {shown}; expected a number.") from None
