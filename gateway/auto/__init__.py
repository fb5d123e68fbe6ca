"""`model: "auto"`: the router that serves, what it is told about the fleet, and the choice. No HTTP in here."""
