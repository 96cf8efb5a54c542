"""What can be made from runs and their evaluations: comparisons, tables, figures, costs, sweeps, the explorer's page.

May import everything but the command line."""
