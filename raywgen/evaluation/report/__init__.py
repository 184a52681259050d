"""Writes a page on what a command left in its folder: one HTML file that loads nothing from the internet."""

from raywgen.evaluation.report.inputs import ReportError
from raywgen.evaluation.report.write import REPORT, write_report

__all__ = ["REPORT", "ReportError", "write_report"]
