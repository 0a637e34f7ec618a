"""Control side: plans, starts and watches runs from a login node; imports no torch."""
