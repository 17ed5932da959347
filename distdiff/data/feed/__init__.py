"""Batches for the network: which cell is read at which step, and by threads, from memory or through dask workers."""
