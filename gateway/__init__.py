"""HTTP in, tokens out: the OpenAI-compatible gateway and its wiring on Ray Serve."""
