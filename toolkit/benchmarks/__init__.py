"""The benchmark harness: ways to train, each trial in a process of its own, compared in pairs."""
