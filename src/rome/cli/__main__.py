"""``python -m rome.cli``, for torchrun."""

from rome.cli.app import main

if __name__ == "__main__":
    main()
