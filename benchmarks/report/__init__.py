"""Reports: JSON results to Markdown, charts and HTML; comparison of two runs."""
