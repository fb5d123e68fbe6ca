"""Everything that turns a request into tokens. Needs torch, transformers and pydantic; knows no HTTP server and no Ray."""
