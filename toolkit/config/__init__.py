"""Options, YAML files and flags. Imports neither torch nor transformers."""
