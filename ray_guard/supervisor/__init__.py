"""The supervisor: the one process per node, user and set of namespaces that decides, counts and writes evidence."""
