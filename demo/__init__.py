"""The demo fleet: three tiny Llama checkpoints and the recipe that makes them from the Python standard library."""
