"""Read clips and sound files that come from strangers."""
