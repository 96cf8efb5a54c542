"""A run: its config, optimizer, folder, loggers and launchers, and the experiments shipped with rome.

May import ``methods`` and the packages below it."""
