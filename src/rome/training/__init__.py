"""The training loop, its log and its validation.

May import runs and what stands below, not evaluation."""
