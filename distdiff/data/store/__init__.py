"""What lies on disk: a distdiff store, its manifest, its layout and coding, and how cells are read back."""
