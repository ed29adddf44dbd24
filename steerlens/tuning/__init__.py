"""Head profiling and parameter search with splits, controls and paired intervals."""
