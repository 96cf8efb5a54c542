"""Evaluation of every example under every attack of a suite, with results stored so that a kill loses nothing.

May import ``runs`` and the packages below it, but not ``training``."""
