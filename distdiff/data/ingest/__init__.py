"""Other people's files (h5ad, AnnData zarr, 10x) to a distdiff store: read, choose genes and cells, split, write."""
