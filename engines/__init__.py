"""Everything that turns a request into tokens. Needs torch, transformers and pydantic; knows no HTTP and no Ray."""
