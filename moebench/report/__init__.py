"""The CAP report: one HTML file, print figures, a Markdown summary. No torch."""
