"""Measurements that anyone can run again; each file prints a table and writes JSON. See METHODOLOGY.md."""
