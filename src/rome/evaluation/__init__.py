"""Evaluation: every example under every attack of a suite, stored so that a kill loses nothing, and the result.

May import runs and what stands below, not training."""
