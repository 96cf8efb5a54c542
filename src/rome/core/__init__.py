"""Foundations of all other packages: components selected by ``kind``, errors that explain themselves, random streams,
files that a kill cannot break, devices, processes, and trust in code. Imports nothing from the rest of rome."""
