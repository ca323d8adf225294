"""The search for tiles: candidates thinned by a cost model and by the compiler, then raced, checked and kept."""
