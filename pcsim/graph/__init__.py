"""WHAT is the network? Nodes, edges, their energies, and the questions that the graph answers."""
