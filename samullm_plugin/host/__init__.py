"""The plugin host: hooks, interfaces, settings."""
