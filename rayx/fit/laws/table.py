"""Laws: the columns that laws are fitted to, read from a CSV or from a store's runs.

Shapes: R runs, K domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from rayx.errors import FitError, did_you_mean
from rayx.fit.csv_files import check_csv
from rayx.fit.laws.law import Law
from rayx.fit.table import of_mixture_alone

WEIGHT = "weight/"


@dataclass(frozen=True, kw_only=True, eq=False)
class LawTable:
    """Runs of several scales.

    Args:
        columns: Input name -> (R,), "weights" (R, K) where there are domains, and "loss".
        domains: Names of the columns of the weights.
        groups: The run of each row, where rows are points of curves.
        warnings: What was left out, in words.
    """

    columns: Mapping[str, np.ndarray]
    domains: tuple[str, ...] = ()
    groups: np.ndarray | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_csv(
        cls, path: str | Path, rename: Mapping[str, str] | None = None, group: str | None = None
    ) -> LawTable:
        """Read params, tokens, loss and what else a law needs, weight/<domain> for mixtures.

        Args:
            path: One row a run; rows without a loss are left out.
            rename: Column in the file -> name of an input, or "loss".
            group: Column that names the run of each row.

        Raises:
            FitError: The file cannot be read, has no column loss, or a cell is no number.
        """
        check_csv(path, FitError)
        try:
            frame = pd.read_csv(path, compression=None)  # a small file stays small
        except (OSError, ValueError) as error:
            raise FitError(f"Cannot read {path}: {error}") from error
        for column in (*(rename or ()), *([group] if group else ())):
            if column not in frame:
                raise FitError(
                    f"{path} has no column {column!r}; it has {', '.join(map(str, frame))}."
                    f"{did_you_mean(column, map(str, frame))}"
                )
        return cls.from_frame(frame.rename(columns=dict(rename or {})), "loss", group, str(path))

    @classmethod
    def from_runs(cls, runs: pd.DataFrame, target: str) -> LawTable:
        """Take the runs of a store whose status is "ok", with the loss of one target.

        Raises:
            FitError: The target is unknown, or the runs are of several corpora.
        """
        known = [str(c)[5:] for c in runs.columns if str(c).startswith("loss/")]
        if target not in known:
            raise FitError(
                f"The runs have no target {target!r}; they have {', '.join(known) or 'none'}."
                f"{did_you_mean(target, known)}"
            )
        runs = of_mixture_alone(runs)
        used = runs.loc[runs["status"] == "ok"]
        if "corpus" in used and used["corpus"].nunique() > 1:
            raise FitError(
                f"The runs are of {used['corpus'].nunique()} corpora; losses of different data "
                "are never pooled. Give a store of one."
            )
        return cls.from_frame(used, f"loss/{target}", None, "the store")

    @classmethod
    def from_frame(
        cls, frame: pd.DataFrame, loss: str, group: str | None = None, where: str = "the table"
    ) -> LawTable:
        """Take every column of numbers as an input; `loss` names that of the losses."""
        if loss not in frame:
            raise FitError(
                f"{where} has no column {loss!r}; it has {', '.join(map(str, frame))}. Expected "
                "params, tokens, loss and what the law needs (spec_tokens, ratio, unique_tokens, "
                "weight/<domain>); rename with --rename N=params,D=tokens."
            )
        seen = frame[loss].notna()
        missing = int((~seen).sum())
        frame = frame.loc[seen]
        domains = tuple(str(c)[len(WEIGHT) :] for c in frame if str(c).startswith(WEIGHT))
        columns = {}
        for name in map(str, frame.columns):
            try:
                column_R = frame[name].to_numpy(dtype=float)
            except (TypeError, ValueError):
                if name == loss or name.startswith(WEIGHT):
                    raise FitError(f"{where}: column {name!r} holds no numbers.") from None
                continue  # an id or a note
            columns["loss" if name == loss else name] = column_R
        if domains:
            columns["weights"] = np.stack([columns.pop(WEIGHT + d) for d in domains], axis=1)
        return cls(
            columns=columns,
            domains=domains,
            groups=frame[group].to_numpy() if group else None,
            warnings=(f"{missing} rows have no loss and were left out",) if missing else (),
        )

    def arrays(self, law: Law) -> list[np.ndarray]:
        """The law's inputs in order, then the loss.

        Raises:
            FitError: A column is missing.
        """
        missing = [name for name in law.inputs if name not in self.columns]
        if missing:
            wanted = [f"{WEIGHT}<domain>" if n == "weights" else n for n in missing]
            raise FitError(
                f"The law {law.name} needs {', '.join(wanted)}, which the table does not have; it "
                f"has {', '.join(self.columns)}. Rename with --rename N=params,D=tokens."
            )
        return [self.columns[name] for name in (*law.inputs, "loss")]

    def named(self, law: Law) -> tuple[str, ...] | None:
        """Names of the domains, for a law that has any."""
        return self.domains if "weights" in law.inputs else None
