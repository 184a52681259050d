"""Writes a page on what a command left in its folder: one HTML file that loads nothing from the internet."""

from raywgen.evaluation.report.inputs import ReportError
from raywgen.evaluation.report.write import PAGES, REPORT, Page, write_report

__all__ = ["PAGES", "REPORT", "Page", "ReportError", "write_report"]
