"""Stage 5, regression: runs in, a model of loss as a function of the mixture out."""

from rayx.fit.auto import fit_once, fit_table, regressors
from rayx.fit.belief import AVERAGE, Belief
from rayx.fit.boosted_trees import ClimbTrees, LightGBM
from rayx.fit.evaluate import evaluate_fit, score
from rayx.fit.fitted import FittedTable, normalised_objective
from rayx.fit.gaussian_process import GaussianProcess
from rayx.fit.inverse_power import InversePower
from rayx.fit.kinds import Joint, join_kinds
from rayx.fit.linear import Mean, Ridge
from rayx.fit.log_linear import LogLinear
from rayx.fit.regressor import PointRegressor, Regressor
from rayx.fit.scheffe import Scheffe
from rayx.fit.table import Table, largest_scale
from rayx.fit.tilted_power import TiltedPower

__all__ = [
    "AVERAGE",
    "Belief",
    "ClimbTrees",
    "FittedTable",
    "GaussianProcess",
    "InversePower",
    "Joint",
    "LightGBM",
    "LogLinear",
    "Mean",
    "PointRegressor",
    "Regressor",
    "Ridge",
    "Scheffe",
    "Table",
    "TiltedPower",
    "evaluate_fit",
    "fit_once",
    "fit_table",
    "join_kinds",
    "largest_scale",
    "normalised_objective",
    "regressors",
    "score",
]
