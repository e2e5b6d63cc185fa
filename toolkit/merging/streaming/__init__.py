"""From file to file: a plan is executed piece by piece, and its result is complete or not there."""
