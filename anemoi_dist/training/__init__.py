"""Setup, loop and record of one attempt on one rank."""
