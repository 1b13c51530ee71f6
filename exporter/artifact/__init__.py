"""The artifact: an output directory that appears whole, its manifest, its verification on loading."""
