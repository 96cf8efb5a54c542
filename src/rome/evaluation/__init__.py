"""Evaluation's parts: suites of cases, the checks before, the store on disk, the report after."""
