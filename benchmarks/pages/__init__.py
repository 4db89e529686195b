"""Markdown pages and plots of the rows."""
