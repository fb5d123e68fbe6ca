"""The precision gate: how low a model's precision may go on somebody's own data, decided by measurement."""
