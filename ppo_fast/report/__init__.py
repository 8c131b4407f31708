"""What a run leaves for its reader: curves, tables, the page, the model card and the glossary of its
metrics.
"""

from ppo_fast.report.card import write_model_card
from ppo_fast.report.curves import draw_curves
from ppo_fast.report.environment import describe_environment
from ppo_fast.report.glossary import GLOSSARY, Metric, glossary_markdown
from ppo_fast.report.health import warnings_for
from ppo_fast.report.page import write_report
from ppo_fast.report.run_folder import RunRecord, Sample, SamplePair, read_run
from ppo_fast.report.summary import RunSummary, SummaryRow, summarise
from ppo_fast.report.tables import print_samples, print_summary, sample_table, summary_table

__all__ = [
    "GLOSSARY",
    "Metric",
    "RunRecord",
    "RunSummary",
    "Sample",
    "SamplePair",
    "SummaryRow",
    "describe_environment",
    "draw_curves",
    "glossary_markdown",
    "print_samples",
    "print_summary",
    "read_run",
    "sample_table",
    "summarise",
    "summary_table",
    "warnings_for",
    "write_model_card",
    "write_report",
]
