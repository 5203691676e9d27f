"""Export: SavedModel and LiteRT files with the compressed kernels in them."""
