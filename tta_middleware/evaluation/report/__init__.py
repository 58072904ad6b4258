"""One self-contained HTML page from a run's records. Needs the extra ``eval``."""

from tta_middleware.evaluation.report.page import to_html

__all__ = ["to_html"]
