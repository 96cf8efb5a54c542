"""Attacks bounded by a perceptual distance: PPGD, LPA and Fast-LPA, and the features that measure it."""
