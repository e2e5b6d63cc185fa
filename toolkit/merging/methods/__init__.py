"""The merge methods; importing this package registers them all. A new one is a new module, listed here."""
