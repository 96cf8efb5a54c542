"""The command line."""

from rome.cli.app import main

main()
