"""What a run is: its schema, where it is found by name, and the table of methods."""
