"""A run, without Ray: planned, checked, trained step by step, resumed and exported."""
