"""Which shapes to have graphs of, on a chip whose graphs are static: planned from a trace of requests."""
