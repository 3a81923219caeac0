"""What a model folder or its configuration says."""
