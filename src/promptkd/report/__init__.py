"""From results records to a page and to tables. Reads `Results` and nothing else."""

from promptkd.report.differences import difference_table
from promptkd.report.labels import unified
from promptkd.report.latex import render_latex
from promptkd.report.page import render_report
from promptkd.report.tables import comparison_table
from promptkd.report.text import render_csv, render_json, render_markdown, terminal_table
