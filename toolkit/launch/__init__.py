"""Where and with how many processes a recipe runs. Imports neither torch nor transformers."""
