"""Where runs meet Ray: the only folder that imports it."""
