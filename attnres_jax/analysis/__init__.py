"""Looking at runs: the comparison of arms, its report, and what a trained model reads and carries by depth."""

from attnres_jax.analysis.arms import Arm
from attnres_jax.analysis.comparison import Comparison, compare, text
from attnres_jax.analysis.inspection import Inspection, depth_weights, inspect_model, inspect_run, magnitudes
from attnres_jax.analysis.judgement import Judgement, judge
from attnres_jax.analysis.plots import depth_heatmap, layer_profile, loss_curves, loss_differences
from attnres_jax.analysis.report import write_report
from attnres_jax.analysis.runs import Run, RunError, read_run

__all__ = [
    "Arm",
    "Comparison",
    "Inspection",
    "Judgement",
    "Run",
    "RunError",
    "compare",
    "depth_heatmap",
    "depth_weights",
    "inspect_model",
    "inspect_run",
    "judge",
    "layer_profile",
    "loss_curves",
    "loss_differences",
    "magnitudes",
    "read_run",
    "text",
    "write_report",
]
