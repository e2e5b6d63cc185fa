"""The merge engine: methods, Fisher estimation, LoRA-space merges, streaming from file to file, recipe files."""
