"""From ``app.yaml`` to an application and the texts of its requests."""
