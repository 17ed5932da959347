"""From files of counts to batches of cells: shard once, then read any cell at any step.

``source`` reads h5ad and AnnData zarr by row slices; ``shard`` turns them into a store (``scan`` and ``layout`` hold
its tasks, ``split`` its splits, ``manifest`` its description); ``store`` reads cells back; ``plan`` says which cell is
read when; ``loader`` joins the two; ``masks`` says which entries are targets.
"""
