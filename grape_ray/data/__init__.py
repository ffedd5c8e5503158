"""Datasets: Arrow tables read over fsspec, checked, fingerprinted, and kept as flat arrays."""
