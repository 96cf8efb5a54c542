"""The training loop, its log and its validation.

May import runs and the packages below it, not evaluation."""
