"""A plan as the data configuration of other trainers.

Every model of a plan (one, or an expert a branch) is written as the stages that it reads from its
first token on, a stage a mixture. Models of a plan with branches share their trunk's stages: train
those once and go on from there. `manifest.json` says which file is which, how many tokens and steps
each stage takes, and what no data configuration can say.

Legend: shares sum to 1 and are exact to a millionth.
"""

from rayx.exports.export import export_plan
from rayx.exports.formats import FORMATS
from rayx.exports.stages import Setting

__all__ = ["FORMATS", "Setting", "export_plan"]
