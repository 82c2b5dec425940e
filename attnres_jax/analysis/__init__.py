"""Looking at runs: the comparison of arms, its report, and what a trained model reads and carries by depth."""

from attnres_jax.analysis.arms import Arm
from attnres_jax.analysis.comparison import Comparison, compare, text
from attnres_jax.analysis.inspection import Inspection, depth_weights, inspect_model, inspect_run, magnitudes
from attnres_jax.analysis.judgement import Judgement, judge
from attnres_jax.analysis.mixing import MEASURES, Mixing, depth_mixing, effective_rank
from attnres_jax.analysis.plots import depth_heatmap, layer_profile, loss_curves, loss_differences, mixing_panels
from attnres_jax.analysis.report import write_report
from attnres_jax.analysis.runs import Run, RunError, is_inspected, read_run

__all__ = [
    "MEASURES",
    "Arm",
    "Comparison",
    "Inspection",
    "Judgement",
    "Mixing",
    "Run",
    "RunError",
    "compare",
    "depth_heatmap",
    "depth_mixing",
    "depth_weights",
    "effective_rank",
    "inspect_model",
    "inspect_run",
    "is_inspected",
    "judge",
    "layer_profile",
    "loss_curves",
    "loss_differences",
    "magnitudes",
    "mixing_panels",
    "read_run",
    "text",
    "write_report",
]
