"""The learned complexity router: which model is good enough for a request. A leaf: no HTTP, no torch."""
