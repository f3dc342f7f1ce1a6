"""Pictures and pages from metrics and routing traces. Nothing here is imported before a report is asked for."""
