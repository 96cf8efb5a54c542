"""The paper's tables, with the numbers of runs beside those of the paper."""
