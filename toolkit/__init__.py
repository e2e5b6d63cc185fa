"""Train apart, merge together."""
