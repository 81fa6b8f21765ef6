"""What people read: the cohort's page and those of its cases, the text and figures of an evaluation."""

from .case_page import PAGE as PAGE
from .case_page import write_case as write_case
from .report import CURVE_FILE as CURVE_FILE
from .report import write_report as write_report
