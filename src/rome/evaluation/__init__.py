"""Evaluation: attack every example with every attack of a suite, store each finished batch, and report the result.

May import runs and the packages below it, not training."""
