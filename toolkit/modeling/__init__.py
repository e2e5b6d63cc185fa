"""Base models, adapters and views of their states."""
