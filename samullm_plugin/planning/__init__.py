"""From an application and a cluster to a verified plan."""
