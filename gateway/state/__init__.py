"""What all gateways know together: which replica holds which prefix, and how much work it has. The door to Redis."""
