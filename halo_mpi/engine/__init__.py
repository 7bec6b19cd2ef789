"""One run from prompt to text: start-up on every rank, the root's token loop, the workers' request loop, the report."""
