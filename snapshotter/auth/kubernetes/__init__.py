"""Pull secrets of a cluster: how to reach its API server, and a watch on its secrets."""
