"""The nouns: applications, clusters, plans, problems, length scenarios."""
