"""From files of counts to batches of cells: build a store once, then read any cell at any training step.

``ingest`` turns other people's files into a store; ``store`` is what lies on disk and how cells are read back; ``feed``
decides which cell is read when and brings it to the network. ``counts`` says what a count is, ``masks`` which entries
are imputation targets; ``splat`` simulates cells and ``images`` reads pictures as counts.
"""
