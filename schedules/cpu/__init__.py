"""Kernel families for CPUs, in order of preference: the first that serves a call is the default."""
FAMILIES = ()
