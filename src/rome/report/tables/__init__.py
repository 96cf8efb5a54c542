"""The tables of the paper with the numbers of runs beside those of the paper."""
