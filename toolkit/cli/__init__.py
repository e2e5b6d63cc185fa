"""The command `meldkit`. Nothing here imports torch or transformers before a run has begun."""
