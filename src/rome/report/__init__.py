"""What is made of runs and their evaluations: comparisons, tables, figures, costs, sweeps, the page to explore a run.

May import everything but the command line."""
