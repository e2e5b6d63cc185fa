"""Participants, rounds, run directory and journal."""
