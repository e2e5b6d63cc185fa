"""The trainer contract and its backends."""
