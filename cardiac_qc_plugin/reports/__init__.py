"""What people read: the cohort's page with its pictures, the text and figures of an evaluation."""

from .report import write_report as write_report
