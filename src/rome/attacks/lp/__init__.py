"""Attacks inside Lp balls: PGD, APGD, the parts of AutoAttack, GMA, SparseFool and the steepest descent of MSD."""
