"""Tuning: the configurations of kernel families that are the fastest on this machine, found by trying them.

`task` says what there is to tune in a compiled model, `prepare` builds candidates and what they are compared with,
`measure` checks and times them in a process of its own, `search` goes through all of it and commits records.
"""
