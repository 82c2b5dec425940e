"""Compares runs by what their workdirs hold: a table on the terminal and, if asked, one HTML file.

Command:  python compare.py runs/a runs/b [--report=FILE]
"""

from absl import flags

from attnres_jax.analysis import compare, text, write_report
from attnres_jax.cli import launch

_REPORT = flags.DEFINE_string("report", None, "Where to write the comparison as a self-contained HTML file.")


def main(workdirs: list[str], overrides: list[str]) -> None:
    """Prints the table of `workdirs`, the first being the one the others are held against."""
    if overrides:
        raise flags.Error(f"--config.{overrides[0]} is not understood; the configs are those of the workdirs")
    comparison = compare(workdirs)
    print(text(comparison))
    if _REPORT.value:
        print(f"\nreport: {write_report(comparison, _REPORT.value)}")


if __name__ == "__main__":
    launch(main)
