"""Messages between the root and its workers: nonblocking, point to point. Knows no LLaMA."""
