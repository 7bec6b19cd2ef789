"""Who computes what: the placement of heads and neuron groups on ranks, and whether their memory holds it."""
