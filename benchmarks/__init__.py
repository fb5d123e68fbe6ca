"""One command per claim. Each prints a table, then one JSON document as its last line with `--json`."""
